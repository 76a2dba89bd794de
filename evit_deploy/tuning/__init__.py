"""Search for the schedule of token counts that changes a model's answers least within a time budget."""
