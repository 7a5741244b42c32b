"""Measuring checkpoints: speed, and whether the text stays the same."""
