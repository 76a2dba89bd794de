"""Names that other people's checkpoints give to tensors, one family a file, and ours; exact both ways."""
