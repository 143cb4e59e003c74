"""Judges measured rows at one alpha and keeps estimate, decision and verdicts of the same rows together.

    judge           by the papers' region
    judge_by_rule   by both gates, at an answer's end
    judge_prompts   by both gates, before an answer is written: what no answer could be let through is refused

The server, calibration and the Python API all judge here, so that a region, its certificate and the rows that they
apply to cannot be mixed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.policy.certificate import Certificate, EstimatorKind, RuleCertificate, RuleTerms
from candor.policy.decision import Decisions, Verdict, decide, decide_by_rule, verdict_of
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Estimate, Measurement
from candor.sdm.rule import AnswerRule, PromptEstimate, RuleEstimate
from candor.sdm.score import sdm_figures


@dataclass(frozen=True, eq=False)
class TwoGates:
    """A rule with the terms at which it was certified: what a bundle holds."""

    rule: AnswerRule
    terms: RuleTerms


@dataclass(frozen=True, eq=False)
class Judgement:
    """n rows judged at alpha. calibrated (n,) bool: whether request and answer kept to the policy.

    certificate: of the region under the estimator that judged, or of the rule; None if nothing was certified.
    rule: None if the papers' region judged.
    """

    alpha: float
    estimate: Estimate
    decisions: Decisions
    calibrated: Tensor
    certificate: Certificate | RuleCertificate | None
    rule: RuleEstimate | None = None

    def verdict(self, row: int) -> Verdict:
        """Returns the verdict on one row, counted from 0."""
        return verdict_of(
            row, self.estimate, self.decisions, self.alpha, self.calibrated, self.certificate, self.rule
        )


def judge(
    estimator: SDMEstimator,
    seen: Measurement,
    alpha: float,
    kind: EstimatorKind,
    *,
    calibrated: Tensor,
    certificates: Sequence[Certificate] = (),
    certified_only: Tensor | None = None,
) -> Judgement:
    """Judges a measurement by `estimator` at one of its alphas.

    calibrated, certified_only: (n,) bool, as `decide` takes them. certificates: the bundle's; the one of this region
    under `kind` is used. Raises ValueError for an alpha without a region.
    """
    estimate = estimator.judge(seen, alpha)
    certificate = certificate_at(certificates, alpha, kind)
    decisions = decide(
        estimate,
        estimator.regions[alpha],
        finite=seen.finite,
        calibrated=calibrated,
        estimator=kind,
        certificate=certificate,
        certified_only=certified_only,
    )
    return Judgement(alpha, estimate, decisions, calibrated, certificate)


def judge_by_rule(
    estimator: SDMEstimator,
    gates: TwoGates,
    seen: Measurement,
    h: Tensor,
    prompts: Tensor,
    alpha: float,
    *,
    calibrated: Tensor,
    prompts_seen: PromptEstimate | None = None,
) -> Judgement:
    """Judges by both gates. seen: `estimator.measure(h)`, h (n, D). prompts (n, P): states at the end of prefill; NaN
    where they are missing. prompts_seen: `gates.rule.know(prompts)`, if it is known already. Raises ValueError for an
    alpha without a region."""
    estimate, certificate = estimator.judge(seen, alpha), gates.terms.at(alpha)
    judged = gates.rule.judge(prompts, h, sdm_figures(seen, estimate.d), prompts_seen)
    finite = seen.finite & prompts.isfinite().all(dim=1) & judged.score.isfinite()
    decisions = decide_by_rule(judged, certificate, finite=finite, calibrated=calibrated)
    return Judgement(alpha, estimate, decisions, calibrated, certificate, judged)


def judge_prompts(
    gates: TwoGates, prompts: Tensor, seen: PromptEstimate, alpha: float, *, calibrated: Tensor
) -> list[Verdict]:
    """Returns the verdict on each of n prompts (n, P) as if its answer had the highest score: where that abstains, no
    answer can be let through. seen: `gates.rule.know(prompts)`. calibrated (n,): whether the request keeps to the
    policy so far."""
    certificate = gates.terms.at(alpha)
    best = torch.full((len(prompts),), torch.inf)
    judged = RuleEstimate(seen.p_value, seen.known, seen.strange, seen.forecast, best, best)
    finite = prompts.isfinite().all(dim=1)
    decisions = decide_by_rule(judged, certificate, finite=finite, calibrated=calibrated)
    return [
        verdict_of(row, None, decisions, alpha, calibrated, certificate, judged)
        for row in range(len(prompts))
    ]


def certificate_at(
    certificates: Sequence[Certificate], alpha: float, kind: EstimatorKind
) -> Certificate | None:
    """Returns the certificate of the region at alpha under that estimator; None if there is none."""
    return next((one for one in certificates if (one.alpha, one.estimator) == (alpha, kind)), None)
