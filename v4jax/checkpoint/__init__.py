"""Checkpoints: the table of names, reading, writing and conversion."""
