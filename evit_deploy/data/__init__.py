"""Images: preprocessing, folders and archives, digit data sets, and batches for training."""
