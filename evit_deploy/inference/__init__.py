"""Inference on images with a bundle that is opened once."""
