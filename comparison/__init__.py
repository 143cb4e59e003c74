"""Compares a bundle with other uncertainty and selective answering methods, on the same states, halves and tests."""
