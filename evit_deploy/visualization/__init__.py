"""What a model keeps, fuses and merges of images: asked of PyTorch or of a bundle's runtimes, and drawn."""
