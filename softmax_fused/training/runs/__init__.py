"""Runs and comparisons: what they train, and the folders that keep their results."""
