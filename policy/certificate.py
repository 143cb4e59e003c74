"""The certificate of the answers that a bundle lets through, from records that were used for nothing else.

    answered   admitted by `estimator` in the region at `alpha`, judged right, q' >= rescaled_similarity_min
    shown      P(right | answered) >= accuracy

With probability at least `confidence`, over draws of the certification records, an issued certificate is true.
It holds for prompts drawn one by one as those records were, and for each certificate by itself.
`calibration.certificate` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from torch import Tensor

EstimatorKind = Literal["lower", "plain"]


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
        if not (0 < self.accuracy < 1 and 0.5 <= self.confidence < 1):
            raise ValueError(
                f"accuracy must be in (0, 1) and confidence in [0.5, 1), got {self.accuracy}, {self.confidence}"
            )
        if not (isfinite(self.rescaled_similarity_min) and self.rescaled_similarity_min >= 1):
            raise ValueError(
                f"rescaled_similarity_min must be at least 1, got {self.rescaled_similarity_min}"
            )
        if not 0 < self.right <= self.answered <= self.records:
            raise ValueError(
                "expected 0 < right <= answered <= records, "
                f"got {self.right}, {self.answered}, {self.records}"
            )
        if not self.accuracy <= self.lower_bound <= 1:
            raise ValueError(f"the bound {self.lower_bound} does not show an accuracy of {self.accuracy}")

    def covers(self, rescaled_similarity: Tensor) -> Tensor:
        """Returns (n,) bool: which answers of the region, with this q' (n,), the certificate covers."""
        return rescaled_similarity >= self.rescaled_similarity_min
