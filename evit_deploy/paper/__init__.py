"""The tables of the EViT paper: published figures next to those computed and measured here."""
