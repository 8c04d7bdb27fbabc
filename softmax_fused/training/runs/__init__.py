"""Training runs and comparisons of losses, and the folders that keep their results."""
