"""The decision: from the estimator's measurement to the verdict. One answer and many use the same code.

An answer is let through unless a line of this table holds. The first line that holds is the reason:

    reason                       region        holds where
    scoring_unavailable          unavailable   there is no measurement, or it is not finite
    out_of_distribution          ood           the estimator knows no similar point: floor(q') = 0 or d = 0
    uncalibrated_request         low           the request or its answer left the calibrated policy
    no_region_at_alpha           low           Algorithm 1 found none
    below_similarity_threshold   low           q' < q'_min
    below_class_threshold        low           the class thresholds psi do not admit it
    predicted_not_following      high          y_hat is not FOLLOWS
    not_certified                high          only certified answers count, and no certificate covers q'
    none: let through            high

The order matters: an answer that could not be checked is never reported as checked, and an answer that was drawn
differently from calibration is never reported as reliable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from candor.policy.certificate import Certificate, EstimatorKind
from candor.sdm.outputs import Estimate
from candor.sdm.region import Region

RegionName = Literal["high", "low", "ood", "unavailable"]
Reason = Literal[
    "scoring_unavailable",
    "out_of_distribution",
    "uncalibrated_request",
    "no_region_at_alpha",
    "below_similarity_threshold",
    "below_class_threshold",
    "predicted_not_following",
    "not_certified",
]
REGION_OF: dict[Reason, RegionName] = {
    "scoring_unavailable": "unavailable",
    "out_of_distribution": "ood",
    "uncalibrated_request": "low",
    "no_region_at_alpha": "low",
    "below_similarity_threshold": "low",
    "below_class_threshold": "low",
    "predicted_not_following": "high",
    "not_certified": "high",
}
"""In the order of precedence."""

REASONS: tuple[Reason | None, ...] = (None, *REGION_OF)
"""The reasons, indexed by their code in `Decisions.reason`."""

FOLLOWS = 1
"""The class of answers that follow their instruction."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """n rows decided. All (n,).

    reason: int64, index into `REASONS`; 0: let through. admitted: by the estimator, within the policy.
    follows: admitted and judged right; a policy that resamples stops at it. covered: let through and certified.
    similarity: the q' that is compared with the threshold; for the lower estimator, q' at d_lower.
    """

    reason: Tensor
    admitted: Tensor
    follows: Tensor
    covered: Tensor
    similarity: Tensor

    @property
    def answered(self) -> Tensor:
        """Returns (n,) bool: which answers a client in mode abstain gets."""
        return self.reason == 0


def decide(
    estimate: Estimate,
    region: Region,
    *,
    finite: Tensor,
    calibrated: Tensor,
    estimator: EstimatorKind,
    certificate: Certificate | None = None,
    certified_only: Tensor | None = None,
) -> Decisions:
    """Returns the decision on each row of an estimate at `region`'s alpha.

    finite, calibrated (n,) bool: whether the row could be measured, and whether request and answer kept to the
    policy. certificate: of this region under this estimator. certified_only (n,) bool: abstain from rows that it does
    not cover.
    """
    lower = estimator == "lower"
    similarity = estimate.q_prime_lower if lower else estimate.q_prime
    admits = estimate.admitted_lower if lower else estimate.admitted
    shown = torch.zeros_like(admits) if certificate is None else certificate.covers(similarity)
    wanted = torch.zeros_like(admits) if certified_only is None else certified_only
    against: dict[Reason, Tensor] = {
        "scoring_unavailable": ~finite,
        "out_of_distribution": estimate.is_ood,
        "uncalibrated_request": ~calibrated,
        "no_region_at_alpha": torch.full_like(admits, not region.found),
        "below_similarity_threshold": ~admits & (similarity < region.q_prime_min),
        "below_class_threshold": ~admits,
        "predicted_not_following": estimate.y_hat != FOLLOWS,
        "not_certified": wanted & ~shown,
    }
    lines = torch.stack([*(against[name] for name in REGION_OF), torch.ones_like(admits)])  # (reasons + 1, n)
    reason = (lines.int().argmax(dim=0) + 1) % len(
        REASONS
    )  # argmax: the first that holds; the last line is none
    first_of_high = REASONS.index("predicted_not_following")
    admitted = (reason == 0) | (reason >= first_of_high)
    return Decisions(
        reason=reason,
        admitted=admitted,
        follows=admitted & (estimate.y_hat == FOLLOWS),
        covered=(reason == 0) & shown,
        similarity=similarity,
    )


@dataclass(frozen=True)
class Figures:
    """The measured figures of one answer, as plain numbers.

    prediction: y_hat. probability, probability_lower, probability_upper: SDM(z') of y_hat with d, d_lower, d_upper.
    similarity: q. rescaled_similarity: q' with d. distance_quantile: d.
    magnitude: z'_y_hat less the largest of the other classes, >= 0. effective_sample_size: n_hat per class.
    """

    prediction: int
    probability: float
    probability_lower: float
    probability_upper: float
    similarity: int
    rescaled_similarity: float
    distance_quantile: float
    magnitude: float
    effective_sample_size: list[int]


@dataclass(frozen=True)
class Verdict:
    """The decision on one answer, with its grounds.

    abstained: the answer is not to be relied on. reason: why not; None if it is. settles: a policy that resamples
    stops at it. certificate: the one that covers the answer. figures: None if nothing was measured.
    """

    region: RegionName
    abstained: bool
    reason: Reason | None
    alpha: float
    calibrated: bool
    settles: bool = False
    certificate: Certificate | None = None
    figures: Figures | None = None


def verdict_of(
    row: int,
    estimate: Estimate,
    decisions: Decisions,
    alpha: float,
    calibrated: Tensor,
    certificate: Certificate | None,
) -> Verdict:
    """Returns the verdict on one row. calibrated (n,), certificate: those that `decide` was given."""
    reason = REASONS[int(decisions.reason[row])]
    return Verdict(
        region="high" if reason is None else REGION_OF[reason],
        abstained=reason is not None,
        reason=reason,
        alpha=alpha,
        calibrated=bool(calibrated[row]),
        settles=bool(decisions.follows[row]),
        certificate=certificate if decisions.covered[row] else None,
        figures=None if reason == "scoring_unavailable" else _figures(row, estimate),
    )


def unavailable(alpha: float, *, calibrated: bool) -> Verdict:
    """Returns the verdict on an answer that could not be scored."""
    return Verdict("unavailable", True, "scoring_unavailable", alpha, calibrated)


def _figures(row: int, estimate: Estimate) -> Figures:
    prediction = int(estimate.y_hat[row])
    z_prime = estimate.z_prime[row]
    others = torch.cat([z_prime[:prediction], z_prime[prediction + 1 :]])
    return Figures(
        prediction=prediction,
        probability=float(estimate.sdm[row, prediction]),
        probability_lower=float(estimate.sdm_lower[row, prediction]),
        probability_upper=float(estimate.sdm_upper[row, prediction]),
        similarity=int(estimate.q[row]),
        rescaled_similarity=float(estimate.q_prime[row]),
        distance_quantile=float(estimate.d[row]),
        magnitude=float(z_prime[prediction] - others.max()),
        effective_sample_size=[int(size) for size in estimate.effective_sample_size[row]],
    )
