"""Labeled images by index, with one module for each storage format."""
