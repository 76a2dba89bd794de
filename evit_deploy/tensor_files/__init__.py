"""Tensors in untrusted files, whose descriptions are checked before any value is read."""
