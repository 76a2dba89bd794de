"""Batches for training, from digits or images on disk: augmentation, caching and transfer to the device."""
