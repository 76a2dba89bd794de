"""Where a checkpoint's tensors lie: files, folders and the hub, and the model inside a file."""
