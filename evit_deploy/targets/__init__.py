"""Conversion targets, one per file, with a common interface."""
