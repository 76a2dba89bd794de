"""Pictures of the patches that a model keeps, fuses and merges, computed by PyTorch or a bundle's runtimes."""
