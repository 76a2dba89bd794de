"""How fast a model is, measured beside its twins."""
