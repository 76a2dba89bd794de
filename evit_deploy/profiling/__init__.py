"""Speed of a model and its twins."""
