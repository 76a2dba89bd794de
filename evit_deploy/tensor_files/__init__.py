"""Tensors in files that others may have written: described and checked before any value is read."""
