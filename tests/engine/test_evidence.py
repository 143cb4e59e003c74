"""Evidence against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from candor.engine.base import EVIDENCE, TokenLogprob
from candor.engine.evidence import FLOOR, from_logprobs

# Two tokens: one the likeliest by 2.0, one that trails the likeliest by 0.5.
TOKENS = (
    TokenLogprob(7, "a", -0.25, ((7, "a", -0.25), (8, "b", -2.25))),
    TokenLogprob(9, "c", -1.5, ((3, "d", -1.0), (9, "c", -1.5))),
)


def test_values_by_hand() -> None:
    expected = {
        "log_mean_surprisal": math.log(0.875 + FLOOR),
        "log_sum_surprisal": math.log(1.75 + FLOOR),
        "log_max_surprisal": math.log(1.5 + FLOOR),
        "mean_margin": 0.75,
        "min_margin": -0.5,
        "log_length": math.log(2),
    }
    assert from_logprobs(EVIDENCE, TOKENS).tolist() == pytest.approx([expected[n] for n in EVIDENCE])


def test_order_is_the_representations() -> None:
    assert from_logprobs(("min_margin", "log_length"), TOKENS).tolist() == pytest.approx([-0.5, math.log(2)])


def test_a_token_beyond_doubt_stays_finite() -> None:
    sure = TokenLogprob(1, "x", 0.0, ((1, "x", 0.0), (2, "y", -40.0)))
    assert from_logprobs(("log_max_surprisal",), [sure]).item() == pytest.approx(math.log(FLOOR))


def test_nothing_asked_or_nothing_said() -> None:
    assert from_logprobs((), TOKENS).shape == (0,)
    assert from_logprobs(EVIDENCE, []).tolist() == [0.0] * len(EVIDENCE)
