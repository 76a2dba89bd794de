"""Recipes and options: sections, files and overrides."""
