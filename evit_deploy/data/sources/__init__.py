"""Labeled images by number: one module for each way in which they can lie on a disk or a hub."""
