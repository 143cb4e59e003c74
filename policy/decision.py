"""The decision: from the measurement to the verdict. One answer and many use the same code.

An answer is let through unless a line of its rule's table holds. The first line that holds is the reason. The lines
of two gates (`decide_by_rule`):

    reason                       region        holds where
    scoring_unavailable          unavailable   there is no measurement, or it is not finite
    out_of_distribution          ood           the prompt is not of the kind that was calibrated on
    uncalibrated_request         low           the request or its answer left the calibrated policy
    no_certificate_at_alpha      low           nothing is certified at this accuracy
    unpromising_prompt           low           F < the certificate's forecast_min: hardly any answer's score would do
    below_score_threshold        low           S < the certificate's score_min
    certificate_suspended        high          audits speak against the certificate, and the operator withholds then
    none: let through            high

and those of the papers' region (`decide`):

    scoring_unavailable          unavailable   as above
    out_of_distribution          ood           the estimator knows no similar point: floor(q') = 0 or d = 0
    uncalibrated_request         low           as above
    no_region_at_alpha           low           Algorithm 1 found none
    below_similarity_threshold   low           q' < q'_min
    below_class_threshold        low           the class thresholds psi do not admit it
    predicted_not_following      high          y_hat is not FOLLOWS
    not_certified                high          only certified answers count, and no certificate covers q'
    certificate_suspended        high          as above
    none: let through            high

The order matters: an answer that could not be checked is never reported as checked, and an answer that was drawn
differently from calibration is never reported as reliable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from candor.policy.certificate import Certificate, EstimatorKind, RuleCertificate
from candor.sdm.outputs import Estimate
from candor.sdm.region import Region
from candor.sdm.rule import RuleEstimate

RegionName = Literal["high", "low", "ood", "unavailable"]
Reason = Literal[
    "scoring_unavailable",
    "out_of_distribution",
    "uncalibrated_request",
    "no_certificate_at_alpha",
    "unpromising_prompt",
    "below_score_threshold",
    "no_region_at_alpha",
    "below_similarity_threshold",
    "below_class_threshold",
    "predicted_not_following",
    "not_certified",
    "certificate_suspended",
]
REGION_OF: dict[Reason, RegionName] = {
    "scoring_unavailable": "unavailable",
    "out_of_distribution": "ood",
    "uncalibrated_request": "low",
    "no_certificate_at_alpha": "low",
    "unpromising_prompt": "low",
    "below_score_threshold": "low",
    "no_region_at_alpha": "low",
    "below_similarity_threshold": "low",
    "below_class_threshold": "low",
    "predicted_not_following": "high",
    "not_certified": "high",
    "certificate_suspended": "high",
}
"""In the order of precedence."""

REASONS: tuple[Reason | None, ...] = (None, *REGION_OF)
"""The reasons, indexed by their code in `Decisions.reason`."""

FOLLOWS = 1
"""The class of answers that follow their instruction."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """n rows decided. All (n,).

    reason: int64, index into `REASONS`; 0: let through. admitted: within the policy, by the estimator or both gates.
    follows: admitted and judged right; a policy that resamples stops at it. covered: let through and certified.
    """

    reason: Tensor
    admitted: Tensor
    follows: Tensor
    covered: Tensor

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
    similarity = compared(estimate, estimator)
    admits = estimate.admitted_lower if estimator == "lower" else estimate.admitted
    shown = torch.zeros_like(admits) if certificate is None else certificate.covers(similarity)
    wanted = torch.zeros_like(admits) if certified_only is None else certified_only
    reason = _first(
        {
            "scoring_unavailable": ~finite,
            "out_of_distribution": estimate.is_ood,
            "uncalibrated_request": ~calibrated,
            "no_region_at_alpha": torch.full_like(admits, not region.found),
            "below_similarity_threshold": ~admits & (similarity < region.q_prime_min),
            "below_class_threshold": ~admits,
            "predicted_not_following": estimate.y_hat != FOLLOWS,
            "not_certified": wanted & ~shown,
        }
    )
    admitted = (reason == 0) | (reason >= REASONS.index("predicted_not_following"))
    follows = admitted & (estimate.y_hat == FOLLOWS)
    return Decisions(reason, admitted, follows, (reason == 0) & shown)


def decide_by_rule(
    estimate: RuleEstimate, certificate: RuleCertificate | None, *, finite: Tensor, calibrated: Tensor
) -> Decisions:
    """Returns the decision on each row by both gates. certificate: at the alpha asked for; without one, nothing is
    let through.

    finite, calibrated: as in `decide`; finite also says whether the prompt's states could be measured.
    """
    known = estimate.known
    covered, promising = torch.zeros_like(known), torch.ones_like(known)
    if certificate is not None:
        covered = certificate.covers(known, estimate.score, estimate.forecast)
        promising = certificate.promising(estimate.forecast)
    reason = _first(
        {
            "scoring_unavailable": ~finite,
            "out_of_distribution": ~known,
            "uncalibrated_request": ~calibrated,
            "no_certificate_at_alpha": torch.full_like(known, certificate is None),
            "unpromising_prompt": ~promising,
            "below_score_threshold": ~covered,
        }
    )
    through = reason == 0
    return Decisions(reason, through, through, through)


def suspend(decisions: Decisions, rows: Tensor) -> Decisions:
    """Returns the decisions with what is let through of `rows` (n,) bool withheld: its certificate is suspended.

    Such an answer still counts as covered: audits of it show when the certificate holds again.
    """
    code = REASONS.index("certificate_suspended")
    withheld = decisions.answered & rows
    return replace(decisions, reason=decisions.reason.masked_fill(withheld, code))


def compared(estimate: Estimate, estimator: EstimatorKind) -> Tensor:
    """Returns (n,) the q' that is compared with thresholds; for the lower estimator, q' at d_lower."""
    return estimate.q_prime_lower if estimator == "lower" else estimate.q_prime


def _first(against: Mapping[Reason, Tensor]) -> Tensor:
    """Returns (n,) int64, index into `REASONS`: the first that holds; 0 where none does. against: in precedence."""
    lines = torch.stack(
        [*against.values(), torch.ones_like(next(iter(against.values())))]
    )  # (reasons + 1, n)
    codes = torch.tensor([*(REASONS.index(reason) for reason in against), 0])
    return codes[lines.int().argmax(dim=0)]  # argmax: the first that holds; the last line always does


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
class RuleFigures:
    """What both gates measured of one answer.

    prompt_known: the first gate's verdict. prompt_p_value: share of calibrated prompts that lie as far out, in (0,
    1]. like_strangers: a probe for declared strangers refused it; never, if none were declared. score: S;
    probability: that the answer is right, in [0, 1]; both None if the prompt was refused before an answer was
    written. score_min: what S must reach; None if nothing is certified at this alpha. forecast, forecast_min: F, and
    what it must reach; None if all answers are begun.
    """

    prompt_known: bool
    prompt_p_value: float
    like_strangers: bool
    score: float | None
    score_min: float | None
    probability: float | None
    forecast: float | None = None
    forecast_min: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The decision on one answer, with its grounds.

    abstained: the answer is not to be relied on. reason: why not; None if it is. settles: a policy that resamples
    stops at it. certificate: the one that covers the answer. figures: None if nothing was measured. rule: None if the
    papers' region judged.
    """

    region: RegionName
    abstained: bool
    reason: Reason | None
    alpha: float
    calibrated: bool
    settles: bool = False
    certificate: Certificate | RuleCertificate | None = None
    figures: Figures | None = None
    rule: RuleFigures | None = None

    @property
    def final(self) -> bool:
        """Whether no further attempt at the prompt could be let through."""
        unknown = self.rule is not None and not self.rule.prompt_known
        return unknown or self.reason in ("no_certificate_at_alpha", "unpromising_prompt")

    @property
    def probability(self) -> float | None:
        """By two gates, that the answer is right; by a region, SDM(z') of the prediction. None if not measured."""
        if self.rule is not None:
            return self.rule.probability
        return None if self.figures is None else self.figures.probability


def verdict_of(
    row: int,
    estimate: Estimate | None,
    decisions: Decisions,
    alpha: float,
    calibrated: Tensor,
    certificate: Certificate | RuleCertificate | None,
    rule: RuleEstimate | None = None,
) -> Verdict:
    """Returns the verdict on one row. calibrated (n,), certificate, rule: those that the decision was given.

    estimate: None for prompts that were refused before an answer was written.
    """
    reason = REASONS[int(decisions.reason[row])]
    measured = reason != "scoring_unavailable"
    return Verdict(
        region="high" if reason is None else REGION_OF[reason],
        abstained=reason is not None,
        reason=reason,
        alpha=alpha,
        calibrated=bool(calibrated[row]),
        settles=bool(decisions.follows[row]),
        certificate=certificate if decisions.covered[row] else None,
        figures=_figures(row, estimate) if measured and estimate is not None else None,
        rule=_rule_figures(row, rule, certificate) if measured and rule is not None else None,
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


def _rule_figures(
    row: int, rule: RuleEstimate, certificate: Certificate | RuleCertificate | None
) -> RuleFigures:
    score = float(rule.score[row])
    written = isfinite(score)
    terms = certificate if isinstance(certificate, RuleCertificate) else None
    forecast = float(rule.forecast[row])
    return RuleFigures(
        prompt_known=bool(rule.known[row]),
        prompt_p_value=float(rule.p_value[row]),
        like_strangers=bool(rule.strange[row]),
        score=score if written else None,
        score_min=terms.score_min if terms else None,
        probability=float(rule.probability[row]) if written else None,
        forecast=forecast if isfinite(forecast) else None,
        forecast_min=terms.forecast_min if terms else None,
    )
