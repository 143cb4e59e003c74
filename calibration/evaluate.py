"""Evaluates a bundle on answers that it was not made from: shares admitted, and their accuracy.

For each alpha and both estimators (lower, which takes the sample size into account and serves by
default, and plain):

    admitted  the verdict y_hat lies in the region, whether it is 0 or 1
    answered  admitted and y_hat = 1: what a client in abstain mode sees

and for each alpha of a two-gate rule:

    known     the prompt passes the first gate
    answered  known, and the score reaches what is certified

Shares are of all records: an answer that cannot be scored is never served as reliable, so it counts as
not admitted. Where the policy resamples, a region's figures are about what the policy serves (`calibration.served`);
figures without a region are about first attempts. Nothing is fitted or chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import torch

from candor.calibration.generate import Labelled, count_faults
from candor.calibration.intervals import Share, bootstrap
from candor.calibration.ranking import probabilistic, rms_calibration
from candor.calibration.served import Attempts, RuleServed, ServedRows
from candor.policy.certificate import EstimatorKind
from candor.policy.judging import TwoGates
from candor.sdm.estimator import SDMEstimator

_REDRAWS = 200


@dataclass(frozen=True)
class RegionFigures:
    """One estimator at one alpha.

    accuracy_answered: P(y = 1 | answered), the accuracy of what is let through.
    accuracy_admitted: P(y_hat = y | admitted). class_accuracy: the same given y = 0 and given y = 1.
    answered_of_class: P(answered | y), given y = 0 and given y = 1. tokens: mean tokens written for one answer,
    over all its attempts.
    """

    admitted: Share
    answered: Share
    accuracy_answered: Share
    accuracy_admitted: Share
    class_accuracy: tuple[Share, Share]
    answered_of_class: tuple[Share, Share]
    tokens: float


@dataclass(frozen=True)
class RuleReading:
    """A two-gate rule at one alpha. accuracy_answered: P(y = 1 | answered). answered_of_class, tokens: as above."""

    known: Share
    answered: Share
    accuracy_answered: Share
    answered_of_class: tuple[Share, Share]
    tokens: float


@dataclass(frozen=True)
class Probabilities:
    """How well a rule's probability that an answer is right fits, on first attempts that can be scored.

    calibration_error: ECE over `ranking.BINS` bins. by_chance: the ECE that so many records show on average where
    every probability is exact. rms_error: what is left without chance, (value, low, high): `ranking.rms_calibration`.
    brier: mean squared error. auroc: for y; None with one class.
    """

    calibration_error: float
    by_chance: float
    rms_error: tuple[float, float, float]
    brier: float
    auroc: float | None


@dataclass(frozen=True)
class Evaluation:
    """Figures over one set of labelled answers.

    records: their number. faults: how many could not be scored, by reason.
    correct: share with y = 1, the accuracy of answering everything.
    verdict: share of the scored with y_hat = y. ood: share of the scored that are out of distribution.
    auroc: of SDM(z')_1 for y among the scored, with its bootstrap interval; None with one class alone.
    lower, plain: by alpha. rule: by alpha, empty without a two-gate rule; probabilities: its, None likewise.
    """

    records: int
    faults: dict[str, int]
    correct: Share
    verdict: Share
    ood: Share
    auroc: tuple[float, float, float] | None
    lower: dict[float, RegionFigures]
    plain: dict[float, RegionFigures]
    rule: dict[float, RuleReading] = field(default_factory=dict)
    probabilities: Probabilities | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; alphas become strings, e.g. "0.9"."""
        fields = asdict(self)
        names = ("value", "low", "high")
        fields["auroc"] = dict(zip(names, self.auroc or (None, None, None), strict=True))
        if self.probabilities is not None:
            fields["probabilities"]["rms_error"] = dict(zip(names, self.probabilities.rms_error, strict=True))
        for kind in ("lower", "plain", "rule"):
            fields[kind] = {str(alpha): reading for alpha, reading in fields[kind].items()}
        return fields


def evaluate(
    estimator: SDMEstimator,
    answers: Sequence[Labelled],
    alphas: Sequence[float],
    seed: int = 0,
    gates: TwoGates | None = None,
) -> Evaluation:
    """Scores labelled answers. seed: for the bootstrap only. gates: the two-gate rule, if there is one.

    Raises ValueError without answers or alphas.
    """
    if not answers or not alphas:
        raise ValueError(f"expected answers and alphas, got {len(answers)} and {len(alphas)}")
    attempts = Attempts.measure(estimator, answers)
    single = attempts.first(1)
    scored, y = single.scored[:, 0], single.y[:, 0]  # (n,)
    any_alpha = estimator.judge(
        single.measurement, alphas[0]
    )  # y_hat, SDM(z') and is_ood are the same at each alpha

    def by_alpha(kind: EstimatorKind) -> dict[float, RegionFigures]:
        return {alpha: region_figures(attempts.served(estimator, alpha, kind)) for alpha in alphas}

    return Evaluation(
        records=len(answers),
        faults=count_faults(answers),
        correct=Share.count(y == 1),
        verdict=Share.count((any_alpha.y_hat == y)[scored]),
        ood=Share.count(any_alpha.is_ood[scored]),
        auroc=_auroc_with_interval(any_alpha.sdm[scored, 1], y[scored], seed),
        lower=by_alpha("lower"),
        plain=by_alpha("plain"),
        rule={alpha: _reading(attempts.served_by_rule(estimator, gates, alpha)) for alpha in alphas}
        if gates
        else {},
        probabilities=_probabilities(single.served_by_rule(estimator, gates, alphas[0]), scored)
        if gates and scored.any()
        else None,
    )


def _reading(served: RuleServed) -> RuleReading:
    answered, y = served.answered, served.y
    return RuleReading(
        known=Share.count(served.known),
        answered=Share.count(answered),
        accuracy_answered=Share.count((y == 1)[answered]),
        answered_of_class=(Share.count(answered[y == 0]), Share.count(answered[y == 1])),
        tokens=float(served.tokens.double().mean()),
    )


def _probabilities(first: RuleServed, scored: torch.Tensor) -> Probabilities:
    p, y = first.probability[scored].double(), first.y[scored]
    weights, bins = torch.ones(1, len(y), dtype=torch.float64), torch.zeros_like(y)
    found = probabilistic(weights, p, bins, y == 1)
    generator = torch.Generator().manual_seed(0)
    exact = (torch.rand(len(p), generator=generator, dtype=torch.float64) < p for _ in range(_REDRAWS))
    by_chance = [float(probabilistic(weights, p, bins, right)["top_label_ece"]) for right in exact]
    area = auroc(p, y)
    return Probabilities(
        float(found["top_label_ece"]),
        sum(by_chance) / len(by_chance),
        rms_calibration(p, y == 1, seed=0),
        float(found["brier"]),
        None if isnan(area) else area,
    )


def region_figures(served: ServedRows) -> RegionFigures:
    admitted, answered, y = served.admitted, served.answered, served.y
    right = served.y_hat == y
    return RegionFigures(
        admitted=Share.count(admitted),
        answered=Share.count(answered),
        accuracy_answered=Share.count(right[answered]),
        accuracy_admitted=Share.count(right[admitted]),
        class_accuracy=(Share.count(right[admitted & (y == 0)]), Share.count(right[admitted & (y == 1)])),
        answered_of_class=(Share.count(answered[y == 0]), Share.count(answered[y == 1])),
        tokens=float(served.tokens.double().mean()),
    )


def auroc(scores: torch.Tensor, y: torch.Tensor) -> float:
    """P(score of a random y = 1 > score of a random y = 0), ties counting half; nan with one class alone."""
    ones, zeros = scores[y == 1], scores[y == 0].sort().values
    if len(ones) == 0 or len(zeros) == 0:
        return nan
    below = torch.searchsorted(zeros, ones, side="left")
    not_above = torch.searchsorted(zeros, ones, side="right")
    return float((below + not_above).double().mean() / (2 * len(zeros)))


def _auroc_with_interval(
    scores: torch.Tensor, y: torch.Tensor, seed: int
) -> tuple[float, float, float] | None:
    value = auroc(scores, y)
    if isnan(value):
        return None
    return value, *bootstrap(lambda rows: auroc(scores[rows], y[rows]), len(y), seed)
