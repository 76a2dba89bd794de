"""Reading checkpoints safely, identifying their architecture, and the model families."""
