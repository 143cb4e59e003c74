"""Candor: language model answers that say whether they can be relied on."""
