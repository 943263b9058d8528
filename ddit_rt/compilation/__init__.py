"""Ahead-of-time compilation of the repeated blocks of a transformer."""
