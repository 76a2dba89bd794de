"""Bundles: the folder that is passed between stages, and its manifest."""
