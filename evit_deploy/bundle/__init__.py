"""What is handed from stage to stage: a folder, and the manifest that describes it."""
