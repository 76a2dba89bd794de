"""The tables of the EViT paper: the published figures beside those that are computed and measured here."""
