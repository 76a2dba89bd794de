"""Verification that a lowered model returns the same answers as PyTorch."""
