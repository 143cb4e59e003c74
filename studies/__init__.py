"""Finished experiments: `python -m studies.NAME` runs one, docs/results says what came of it. Nothing imports them."""
