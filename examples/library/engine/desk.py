"""Answers questions, in place of a language model: adds, and is unsure of one sum in three."""

import numpy

WIDTH = 6


def ask(count: int, seed: int) -> tuple[list[str], list[str], numpy.ndarray]:
    """So many sums: responses, references, and the states (count, WIDTH) in which they were answered."""
    rng = numpy.random.default_rng(seed)
    right = rng.integers(100, 1000, size=(count, 2)).sum(axis=1)
    unsure = rng.random(count) < 1 / 3
    wrong = unsure & (rng.random(count) < 0.98)
    states = rng.normal(size=(count, WIDTH)) + 2 * unsure[:, None]
    return [str(number) for number in right + 10 * wrong], [str(number) for number in right], states
