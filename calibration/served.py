"""Selects the attempts that the server would serve: the decision of `candor.policy`, on labelled answers.

    attempt 1, 2, ..., k   written until one is *answered*: admitted at alpha and judged right
    served                 that attempt, or the last one

k = 1 is one answer a prompt. An attempt that the server would never admit (`Labelled.fault`) is not answered, so the
next one follows, as in `app.answering.service`. Regions and certificates of a policy that resamples come from what it
serves, not from its attempts, because taking the first answer that looks right also selects those that only look so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan

import torch
from torch import Tensor

from candor.calibration.generate import Labelled, stacked_prompts
from candor.policy.certificate import EstimatorKind
from candor.policy.decision import FOLLOWS, compared
from candor.policy.judging import TwoGates, judge, judge_by_rule
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Measurement
from candor.sdm.region import Region, find_region

_STRIDES = 50
"""Where no threshold is accepted, a fiftieth of the remaining rows is cut off before the policy is run again."""


@dataclass(frozen=True, eq=False)
class ServedRows:
    """One row a prompt: the attempt that is served. All are (n,), except sdm (n, C).

    admitted: by the estimator that chose the attempt. q_prime: the value compared with its threshold, so q' at
    d_lower for the lower one. attempts: how many were written, from 1. tokens: of all of them.
    """

    y: Tensor
    y_hat: Tensor
    admitted: Tensor
    sdm: Tensor
    q_prime: Tensor
    attempts: Tensor
    tokens: Tensor

    @property
    def answered(self) -> Tensor:
        """(n,) bool: the answers that a client in abstain mode sees."""
        return self.admitted & (self.y_hat == FOLLOWS)


@dataclass(frozen=True, eq=False)
class RuleServed:
    """One row a prompt: the attempt that is served by both gates. All are (n,).

    known: the prompt passes the first gate. probability: that this attempt is right. answered: let through.
    attempts: how many were written, from 1. tokens: of all of them.
    """

    y: Tensor
    known: Tensor
    probability: Tensor
    answered: Tensor
    attempts: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Attempts:
    """k attempts at each of n prompts, measured once for all alphas.

    measurement, h (n k, D): n k rows, the attempts of a prompt next to each other. y, scored, tokens: (n, k).
    prompts: (n k, P), states at the end of prefill; NaN where they are not known, P = 0 where none is.
    """

    measurement: Measurement
    h: Tensor
    prompts: Tensor
    y: Tensor
    scored: Tensor
    tokens: Tensor

    @classmethod
    def measure(cls, estimator: SDMEstimator, answers: Sequence[Labelled]) -> Attempts:
        """Raises ValueError where answers have different numbers of attempts."""
        rows = [answer.attempts for answer in answers]
        if len({len(row) for row in rows}) != 1:
            counts = sorted({len(row) for row in rows})
            raise ValueError(f"expected answers, all with the same number of attempts, got {counts}")
        # The estimator never admits rows of nan, so answers that cannot be scored need no path of their own.
        nowhere = torch.full_like(estimator.adaptor.mean, nan)
        h = torch.stack([one.h if one.fault is None else nowhere for row in rows for one in row])  # (n k, D)
        return cls(
            estimator.measure(h),
            h,
            stacked_prompts([one for row in rows for one in row]),
            torch.tensor([[one.label for one in row] for row in rows]),
            torch.tensor([[one.fault is None for one in row] for row in rows]),
            torch.tensor([[one.tokens for one in row] for row in rows]),
        )

    def first(self, k: int) -> Attempts:
        """The attempts if at most k had been allowed."""
        n, most = self.y.shape
        rows = torch.arange(n * most).view(n, most)[:, :k].flatten()
        kept = {name: value[rows] for name, value in vars(self.measurement).items()}
        return Attempts(
            Measurement(**kept),
            self.h[rows],
            self.prompts[rows],
            self.y[:, :k],
            self.scored[:, :k],
            self.tokens[:, :k],
        )

    def served(self, estimator: SDMEstimator, alpha: float, kind: EstimatorKind) -> ServedRows:
        """By the papers' region. estimator: the one that measured; its regions may differ."""
        judged = judge(estimator, self.measurement, alpha, kind, calibrated=self.scored.flatten())
        estimate, decisions = judged.estimate, judged.decisions
        at = self._stops(decisions.follows)
        row = torch.arange(len(at)) * self.y.shape[1] + at
        return ServedRows(
            y=_at(self.y, at),
            y_hat=estimate.y_hat[row],
            admitted=decisions.admitted[row],
            sdm=estimate.sdm[row],
            q_prime=compared(estimate, kind)[row],
            attempts=at + 1,
            tokens=_at(self.tokens.cumsum(dim=1), at),
        )

    def served_by_rule(self, estimator: SDMEstimator, gates: TwoGates, alpha: float) -> RuleServed:
        """By both gates. estimator: the one that measured."""
        calibrated = self.scored.flatten()
        judged = judge_by_rule(
            estimator, gates, self.measurement, self.h, self.prompts, alpha, calibrated=calibrated
        )
        assert judged.rule is not None  # `judge_by_rule` makes one
        follows = judged.decisions.follows.view(self.y.shape)
        at = self._stops(judged.decisions.follows)
        return RuleServed(
            y=_at(self.y, at),
            known=judged.rule.known.view(self.y.shape)[:, 0],
            probability=_at(judged.rule.probability.view(self.y.shape), at),
            answered=follows.any(dim=1),
            attempts=at + 1,
            tokens=_at(self.tokens.cumsum(dim=1), at),
        )

    def _stops(self, follows: Tensor) -> Tensor:
        """follows (n k,) bool -> (n,) int64: the first attempt at which the policy stops, else the last."""
        n, k = self.y.shape
        stops = follows.view(n, k)
        return torch.where(stops.any(dim=1), stops.int().argmax(dim=1), k - 1)  # argmax: the first


def _at(values: Tensor, column: Tensor) -> Tensor:
    """values (n, k), column (n,) -> (n,)."""
    return values.gather(1, column.unsqueeze(1)).squeeze(1)


def regions_of_policy(estimator: SDMEstimator, attempts: Attempts) -> Mapping[float, Region]:
    """The estimator's regions, tightened until Algorithm 1 accepts what the policy serves within them.

    attempts: at the calibration half's prompts. The region decides which attempt is served, and the served attempts
    decide the region. So the thresholds are only raised, until the (1 - alpha) quantile of every class, over what is
    served with q' >= q'_min, is at least alpha and at most psi. With one attempt they stay as they are.
    """
    return {alpha: _settled(estimator, attempts, region) for alpha, region in estimator.regions.items()}


def _settled(estimator: SDMEstimator, attempts: Attempts, region: Region) -> Region:
    while region.found:
        served = attempts.served(replace(estimator, regions={region.alpha: region}), region.alpha, "plain")
        inside = served.q_prime >= region.q_prime_min
        q_prime = served.q_prime[inside].sort().values
        if len(q_prime) == 0:
            break
        found = find_region(
            served.sdm[inside], served.q_prime[inside], served.y[inside], region.alpha, estimator.conventions
        )
        if found.q_prime_min > q_prime[0]:  # not accepted for all rows served within: try a stricter one
            above = q_prime[q_prime > q_prime[0]]
            stride = len(above) // _STRIDES
            least = found.q_prime_min if found.found else float(above[stride]) if len(above) else inf
            region = replace(region, q_prime_min=least)
        elif bool((found.psi > region.psi).any()):
            region = replace(region, psi=torch.maximum(region.psi, found.psi))
        else:
            return region
    return Region(region.alpha, inf, torch.full_like(region.psi, inf))
