"""Layouts: tensor names of third-party checkpoints and their conversion to and from timm's, one family per file."""
