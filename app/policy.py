"""From what the estimator measured to what the client is told. Pure functions.

    region = unavailable   nothing was measured: no state, one that is not finite, no score in time
             ood           the estimator knows nothing like it: floor(q') = 0 or d = 0
             low           the request left the calibrated policy, or the estimator does not admit
             high          the estimator admits at alpha

    abstained = not (region = high and y_hat = FOLLOWS), and where only certified answers are wanted,
                also where no certificate covers q'

The order matters: an answer that could not be checked is never reported as checked, and one that was
generated in another way than the calibration's is never reported as reliable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from candor.engine.base import Generation, Sampling
from candor.model_store.certificate import Certificate
from candor.model_store.certificate import EstimatorKind as EstimatorKind
from candor.model_store.manifest import Policy

RegionName = Literal["high", "low", "ood", "unavailable"]
Reason = Literal[
    "out_of_distribution",
    "below_similarity_threshold",
    "below_class_threshold",
    "predicted_not_following",
    "not_certified",
    "no_region_at_alpha",
    "uncalibrated_request",
    "scoring_unavailable",
]

FOLLOWS = 1
"""The class of answers that follow their instruction."""


@dataclass(frozen=True)
class Reading:
    """One answer's row of an Estimate, in plain numbers.

    prediction: y_hat.
    probability, probability_lower, probability_upper: SDM(z') of y_hat with d, d_lower and d_upper.
    similarity: q. rescaled_similarity, rescaled_similarity_lower: q' with d and with d_lower.
    distance_quantile: d. magnitude: z'_y_hat less the largest of the other classes, >= 0.
    effective_sample_size: n_hat per class.
    admitted, admitted_lower: by the plain and by the sample-size-aware estimator.
    similarity_threshold: q'_min at the alpha asked for, infinite where there is no region.
    """

    prediction: int
    probability: float
    probability_lower: float
    probability_upper: float
    similarity: int
    rescaled_similarity: float
    rescaled_similarity_lower: float
    distance_quantile: float
    magnitude: float
    effective_sample_size: tuple[int, ...]
    is_ood: bool
    admitted: bool
    admitted_lower: bool
    similarity_threshold: float


@dataclass(frozen=True)
class Decision:
    """abstained: whether the answer is not to be relied on. reason: None iff it is.

    certificate: what was certified of answers like this one; None where nothing was.
    """

    region: RegionName
    abstained: bool
    reason: Reason | None
    certificate: Certificate | None = None

    @property
    def settles(self) -> bool:
        """Whether a policy that resamples ends with this answer: in the region and judged right."""
        return self.reason in (None, "not_certified")


def decide(
    reading: Reading | None,
    *,
    calibrated: bool,
    estimator: EstimatorKind,
    certificate: Certificate | None = None,
    certified_only: bool = False,
) -> Decision:
    """The verdict on one answer. reading: None where it could not be scored.

    certificate: of the region at the reading's alpha under this estimator, if there is one. certified_only: abstain
    from what it does not cover.
    """
    if reading is None:
        return Decision("unavailable", True, "scoring_unavailable")
    if reading.is_ood:
        return Decision("ood", True, "out_of_distribution")
    if not calibrated:
        return Decision("low", True, "uncalibrated_request")
    lower = estimator == "lower"
    similarity = reading.rescaled_similarity_lower if lower else reading.rescaled_similarity
    if reading.admitted_lower if lower else reading.admitted:
        if reading.prediction != FOLLOWS:
            return Decision("high", True, "predicted_not_following")
        if certificate is not None and certificate.covers(similarity):
            return Decision("high", False, None, certificate)
        return Decision("high", True, "not_certified") if certified_only else Decision("high", False, None)
    if math.isinf(reading.similarity_threshold):
        return Decision("low", True, "no_region_at_alpha")
    if similarity < reading.similarity_threshold:
        return Decision("low", True, "below_similarity_threshold")
    return Decision("low", True, "below_class_threshold")


def samples_as_calibrated(policy: Policy, sampling: Sampling) -> bool:
    """Whether answers are drawn from the distribution that was calibrated.

    A seed picks a draw and does not change what is drawn from; at temperature 0 neither do top_p and top_k.
    Stop strings and max_tokens count only once they have cut an answer (`ended_as_calibrated`).
    """
    if sampling.frequency_penalty or sampling.presence_penalty or sampling.temperature != policy.temperature:
        return False
    return sampling.temperature == 0 or (sampling.top_p, sampling.top_k) == (policy.top_p, policy.top_k)


def ended_as_calibrated(policy: Policy, generation: Generation) -> bool:
    """Whether the answer ended on its own, within the length that calibration allowed."""
    return not generation.truncated and generation.completion_tokens <= policy.max_tokens
