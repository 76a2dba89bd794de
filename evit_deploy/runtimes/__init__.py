"""Runtimes that can run a model, one per file, with a common interface."""
