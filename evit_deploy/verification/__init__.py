"""Proof that a lowered model answers like PyTorch."""
