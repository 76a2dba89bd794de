"""Digits to train on without a download: as they are, and on photographs."""
