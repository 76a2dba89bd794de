"""The schedule of token counts that keeps most of a model's answers at a budget of time."""
