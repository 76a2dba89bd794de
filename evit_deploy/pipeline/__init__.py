"""From a checkpoint or a recipe to a bundle."""
