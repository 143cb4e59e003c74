"""Finished experiments: `python -m studies.NAME`; docs/results says what came of each. Nothing imports them."""
