"""A certificate's fields: which values are the last that are allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from candor.policy.certificate import Certificate

AT_THE_EDGE = Certificate(0.9, "plain", 0.75, 0.5, 1.0, records=20, answered=20, right=20, lower_bound=0.75)
"""Every field that has an end of its range stands there."""


def test_the_ends_of_the_ranges_are_within_them() -> None:
    assert replace(AT_THE_EDGE, lower_bound=1.0).answered == AT_THE_EDGE.records
    assert replace(AT_THE_EDGE, records=1, answered=1, right=1).right == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"accuracy": 0.0}, "accuracy must be in"),
        ({"accuracy": 1.0, "lower_bound": 1.0}, "accuracy must be in"),
        ({"confidence": 0.499}, "confidence in"),
        ({"confidence": 1.0}, "confidence in"),
        ({"rescaled_similarity_min": 0.999}, "at least 1"),
        ({"rescaled_similarity_min": float("nan")}, "at least 1"),
        ({"right": 0}, "0 < right"),
        ({"right": 21}, "right <= answered"),
        ({"records": 19}, "answered <= records"),
        ({"lower_bound": 0.749}, "does not show"),
        ({"lower_bound": 1.001}, "does not show"),
        ({"lower_bound": float("nan")}, "does not show"),
    ],
)
def test_what_lies_beyond_them_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(AT_THE_EDGE, **wrong)  # type: ignore[arg-type]
