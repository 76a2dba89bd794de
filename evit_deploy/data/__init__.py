"""Images: preprocessing, folders and archives, digits, and the batches that training draws."""
