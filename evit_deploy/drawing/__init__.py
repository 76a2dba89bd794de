"""Pictures of the patches that a model keeps, fuses or merges, and of their scores."""
