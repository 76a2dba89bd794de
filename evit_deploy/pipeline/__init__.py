"""The stages in order: from a checkpoint or a recipe to a verified bundle."""
