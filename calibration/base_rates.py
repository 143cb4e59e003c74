"""How the accuracy among the answered depends on the share of right answers (the base rate).

Class thresholds are quantiles within each class, so Algorithm 1 does not depend on the base rate; the accuracy among
the answered does. Under label shift, only the base rate pi = P(y = 1) changes and the answers of one class look the
same. Then r_c = P(answered | y = c) stays, and

    accuracy(pi) = pi r_1 / (pi r_1 + (1 - pi) r_0).

It rises with r_1 and falls with r_0, so exact intervals for both, each at half the error, bound it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from candor.calibration.evaluate import Evaluation, RegionFigures
from candor.calibration.intervals import CONFIDENCE, Share, clopper_pearson

BASE_RATES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Shifted:
    """Accuracy among the answered at a base rate, with its interval. value is None where nothing is answered."""

    base_rate: float
    value: float | None
    low: float
    high: float


def shifted(reading: RegionFigures, base_rate: float) -> Shifted:
    """base_rate: the assumed share of right answers, in [0, 1]."""
    wrong, right = reading.answered_of_class
    (low_0, high_0), (low_1, high_1) = _interval(wrong), _interval(right)
    value = None
    if wrong.value is not None and right.value is not None:
        value = _accuracy(base_rate, right.value, wrong.value)
    return Shifted(
        base_rate,
        value,
        _accuracy(base_rate, low_1, high_0) or 0.0,
        1.0 if (high := _accuracy(base_rate, high_1, low_0)) is None else high,
    )


def least_base_rate(reading: RegionFigures, accuracy: float) -> float:
    """The least base rate, in (0, 1], from which the lower end of `shifted` is at least `accuracy`; 1 if none is."""
    wrong, right = reading.answered_of_class
    r_0, r_1 = _interval(wrong)[1], _interval(right)[0]
    if r_1 == 0:
        return 1.0
    return accuracy * r_0 / (accuracy * r_0 + (1 - accuracy) * r_1)


def base_rate_report(evaluation: Evaluation) -> dict[str, Any]:
    """For the report: the base rate of the figures, and what they would be at other base rates."""

    def of(reading: RegionFigures, alpha: float) -> dict[str, Any]:
        wrong, right = reading.answered_of_class
        return {
            "answered_if_wrong": wrong.to_json(),
            "answered_if_right": right.to_json(),
            "accuracy_answered": {
                "natural": reading.accuracy_answered.to_json(),
                "shifted": [asdict(shifted(reading, rate)) for rate in BASE_RATES],
            },
            "least_base_rate_for_alpha": least_base_rate(reading, alpha),
        }

    return {
        "natural": evaluation.correct.to_json(),
        "class_thresholds_depend_on_it": False,
        "accuracy_answered_depends_on_it": True,
        "lower": {str(alpha): of(reading, alpha) for alpha, reading in evaluation.lower.items()},
        "plain": {str(alpha): of(reading, alpha) for alpha, reading in evaluation.plain.items()},
    }


def base_rate_table(evaluation: Evaluation) -> str:
    """A text table of accuracy among the answered at the natural base rate and at others, one line a region."""
    natural = evaluation.correct.value
    head = f"right if answered, were another share of answers right (natural: {_percent(natural)})"
    rates = "".join(f"{f'at {_percent(rate)}':<20}" for rate in BASE_RATES)
    lines = [head, f"  {'alpha':<7}{'estimator':<11}{rates}".rstrip()]
    for kind, readings in (("lower", evaluation.lower), ("plain", evaluation.plain)):
        for alpha, reading in readings.items():
            if not reading.answered.hits:
                continue
            found = [shifted(reading, rate) for rate in BASE_RATES]
            cells = "".join(
                f"{f'{_percent(s.value)} [{100 * s.low:.1f}, {100 * s.high:.1f}]':<20}" for s in found
            )
            lines.append(f"  {alpha:<7}{kind:<11}{cells}".rstrip())
    return "\n".join(lines)


def _interval(share: Share) -> tuple[float, float]:
    """The interval of one of two shares that must both be covered."""
    if share.of == 0:
        return 0.0, 1.0
    return clopper_pearson(share.hits, share.of, confidence=1 - (1 - CONFIDENCE) / 2)


def _accuracy(base_rate: float, of_right: float, of_wrong: float) -> float | None:
    answered = base_rate * of_right + (1 - base_rate) * of_wrong
    return base_rate * of_right / answered if answered else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
