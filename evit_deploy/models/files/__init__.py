"""Locating a checkpoint's tensors: files, folders, the hub, and the model inside a file."""
