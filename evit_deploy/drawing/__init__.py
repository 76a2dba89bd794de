"""Pictures of what a model does with an image: what it keeps, what it fuses or merges, and by which scores."""
