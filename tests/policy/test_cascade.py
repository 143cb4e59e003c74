"""What a cascade's certificate must show, and which answers it covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from candor.policy.cascade import CascadeCertificate, CascadeTerms

ONE = CascadeCertificate(0.9, 0.95, 400, 100, 0.33, 390, 360, 0.9)
TERMS = CascadeTerms("big", 64, 71.5, None, (ONE,))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"confidence": 0.4}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"right": 391}, "right <= answered"),
        ({"answered": 401}, "answered <= records"),
        ({"answered": 299, "right": 290}, "at least those not escalated"),
        ({"escalated": 401}, "escalated"),
        (
            {"escalated": 400, "escalated_at_most": 1.0, "answered": 0, "right": 0, "lower_bound": 0.0},
            "nothing",
        ),
        ({"lower_bound": 0.93}, "do not show 0.93"),
        ({"lower_bound": -0.1}, "do not show"),
        ({"lower_bound": float("nan")}, "do not show"),
        ({"escalated_at_most": 0.24}, "do not show 0.24"),
        ({"escalated_at_most": 1.1}, "do not show"),
    ],
)
def test_counts_bear_the_bounds_out(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(ONE, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": " "},
        {"max_tokens": 0},
        {"prompt_tokens": -1.0},
        {"completion_tokens": float("inf")},
        {"certificates": (ONE, ONE)},
    ],
)
def test_terms_in_their_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        replace(TERMS, **wrong)


def test_it_covers_what_was_asked_as_it_was_calibrated() -> None:
    assert TERMS.covering("big", 0.9, 64, calibrated=True) is ONE
    assert TERMS.covering("bigger", 0.9, 64, calibrated=True) is None
    assert TERMS.covering("big", 0.95, 64, calibrated=True) is None
    assert TERMS.covering("big", 0.9, 63, calibrated=True) is None
    assert TERMS.covering("big", 0.9, 64, calibrated=False) is None
