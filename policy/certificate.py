"""The certificates of the answers that a bundle lets through, from records that were used for nothing else.

    Certificate        answered: admitted by `estimator` in the region at `alpha`, judged right,
                                 q' >= rescaled_similarity_min
    RuleCertificate    answered: the prompt is known, its forecast reaches forecast_min where there is one, and the
                                 answer's score reaches score_min (`sdm.rule`)
    shown by both      P(right | answered) >= accuracy

With probability at least `confidence`, over draws of the certification records, an issued certificate is true.
It holds for prompts drawn one by one as those records were, and for each certificate by itself.
`calibration.certificate` and `calibration.rule_certificate` compute them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

from torch import Tensor

EstimatorKind = Literal["lower", "plain"]
RuleKind = Literal["two-gates", "sdm"]
"""What lets answers through: a prompt gate and an answer score, or the papers' region under an estimator."""


@dataclass(frozen=True)
class Certificate:
    """A certified accuracy. alpha, estimator: its region. accuracy: the certified value. confidence: 1 - delta.

    rescaled_similarity_min: lowest q' that is covered, >= 1; for the lower estimator, q' at d_lower.
    records: prompts set aside. answered: those answered within the certified region. right: number of these
    with a right answer. lower_bound: exact one-sided bound for P(right | answered) at `confidence`.

    Raises ValueError if counts, bound and accuracy do not agree.
    """

    alpha: float
    estimator: EstimatorKind
    accuracy: float
    confidence: float
    rescaled_similarity_min: float
    records: int
    answered: int
    right: int
    lower_bound: float

    def __post_init__(self) -> None:
        if not (isfinite(self.rescaled_similarity_min) and self.rescaled_similarity_min >= 1):
            raise ValueError(
                f"rescaled_similarity_min must be at least 1, got {self.rescaled_similarity_min}"
            )
        _require_shown(self)

    def covers(self, rescaled_similarity: Tensor) -> Tensor:
        """Returns (n,) bool: which answers of the region, with this q' (n,), the certificate covers."""
        return rescaled_similarity >= self.rescaled_similarity_min


@dataclass(frozen=True)
class RuleCertificate:
    """A certified accuracy of a two-gate rule. alpha: the accuracy asked for, at which it serves; accuracy: the
    certified value, at least alpha. confidence: 1 - delta.

    score_min: lowest score that is let through. records: prompts set aside. answered: those let through.
    right: number of these with a right answer. base_right: records with a right attempt. lower_bound: exact
    one-sided bound for P(right | answered) at `confidence`. forecast_min: lowest forecast of a prompt whose answer is
    begun; None: all are.

    Raises ValueError if counts, bound and accuracy do not agree.
    """

    alpha: float
    accuracy: float
    confidence: float
    score_min: float
    records: int
    answered: int
    right: int
    base_right: int
    lower_bound: float
    forecast_min: float | None = None

    def __post_init__(self) -> None:
        for name in ("score_min", "forecast_min"):
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.accuracy < self.alpha:
            raise ValueError(f"an accuracy of {self.accuracy} does not serve at alpha {self.alpha}")
        if not self.right <= self.base_right <= self.records:
            raise ValueError(f"{self.right} right do not go with {self.base_right} of {self.records}")
        _require_shown(self)

    def promising(self, forecast: Tensor) -> Tensor:
        """Returns (n,) bool: which prompts' answers are begun. forecast (n,)."""
        least = -inf if self.forecast_min is None else self.forecast_min
        return forecast.double() >= least

    def covers(self, known: Tensor, score: Tensor, forecast: Tensor) -> Tensor:
        """Returns (n,) bool: which answers the rule lets through. known (n,) bool, score, forecast (n,)."""
        return known & (score.double() >= self.score_min) & self.promising(forecast)


@dataclass(frozen=True)
class RuleTerms:
    """How a bundle's two-gate rule was made. score: name of the score chosen (`calibration.rule`).

    eps: share of prompts of the calibrated kind that the gate may refuse. refused_at_most: the share that it refuses
    at most, with `confidence` over draws of its reference. strangers: declared prompts that a probe was fitted on; 0:
    none. tokens: mean length of the calibrated answers.
    certificates: at most one for each alpha; where there is none, nothing is let through. may_lose: share of the
    answers let through that may be lost because they are not begun; None: all are begun.

    Raises ValueError for values out of range, and for two certificates at one alpha.
    """

    score: str
    eps: float
    refused_at_most: float
    confidence: float
    tokens: float
    strangers: int = 0
    certificates: tuple[RuleCertificate, ...] = ()
    may_lose: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.eps < 1 and 0 < self.refused_at_most <= 1 and 0.5 <= self.confidence < 1):
            raise ValueError(
                "expected eps in (0, 1), refused_at_most in (0, 1] and confidence in [0.5, 1); got "
                f"{self.eps}, {self.refused_at_most}, {self.confidence}"
            )
        if not (isfinite(self.tokens) and self.tokens >= 0 and self.strangers >= 0):
            raise ValueError(
                f"tokens and strangers must be at least 0, got {self.tokens} and {self.strangers}"
            )
        if self.may_lose is not None and not 0 < self.may_lose < 1:
            raise ValueError(f"may_lose must be in (0, 1), got {self.may_lose}")
        if self.may_lose is None and any(one.forecast_min is not None for one in self.certificates):
            raise ValueError("a certificate has a forecast_min, and nothing may be lost")
        if len({one.alpha for one in self.certificates}) < len(self.certificates):
            raise ValueError("expected at most one certificate for each alpha")

    def at(self, alpha: float) -> RuleCertificate | None:
        """Returns the certificate at alpha; None if there is none."""
        return next((one for one in self.certificates if one.alpha == alpha), None)


def _require_shown(one: Certificate | RuleCertificate) -> None:
    """Raises ValueError unless counts, bound and accuracy agree."""
    if not (0 < one.accuracy < 1 and 0.5 <= one.confidence < 1):
        raise ValueError(
            f"accuracy must be in (0, 1) and confidence in [0.5, 1), got {one.accuracy}, {one.confidence}"
        )
    if not 0 < one.right <= one.answered <= one.records:
        raise ValueError(
            f"expected 0 < right <= answered <= records, got {one.right}, {one.answered}, {one.records}"
        )
    if not one.accuracy <= one.lower_bound <= 1:
        raise ValueError(f"the bound {one.lower_bound} does not show an accuracy of {one.accuracy}")
