"""Digits to train on without a download: as they are, on photographs, and the curriculum of the latter."""
