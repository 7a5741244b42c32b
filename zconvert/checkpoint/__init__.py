"""Checkpoints on disk and on the Hub: reading, grafting, writing. No model is built here."""
