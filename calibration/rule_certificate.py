"""Certifies a whole rule (gate, score and threshold): a lower bound on the accuracy among the answers let through.

The records are used for nothing else; each prompt counts once, with its first answer. The rule at threshold t lets n
through, r of them right; r is Binomial(n, p), p = P(right | let through). Thresholds are tested in an order fixed
beforehand, each at the full delta by the exact binomial test of p < accuracy, and the first failure ends the test
(fixed-sequence testing: Learn then Test, 2110.01052). The last that passed is certified. A false one is certified
with probability at most delta.

    order     CUTS quantiles of cross-validated scores of the fitting records that the gate lets pass, strictest first
    start     where the test is likeliest to pass, if the accuracy there is what those scores say

Those scores only fix where to look: if they are wrong, a certificate is missed, not false. The certificate is about
prompts drawn as the certification records were, on average, not about each group among them.

The *ceiling* holds for every rule: with base accuracy b and wanted accuracy a, P(answered) a <= P(answered, right)
<= b, so at most b / a is answered and at least ((1 - b) - (1 - a)) / a withheld (2606.29054).
The *horizon*: with k wrong of n, at most u of the next m let through are wrong with confidence 1 - delta. u is the
(1 - delta) quantile of BetaBinomial(m; k + 1, n - k), the prediction of the upper Clopper-Pearson posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from candor.calibration.certificate import ENOUGH_POWER, Claim, Step, fixed_sequence, power, proven_bound
from candor.calibration.errors import CalibrationError
from candor.calibration.rule import FittedRule, RuleRows
from candor.sdm.rule import AnswerRule, RuleEstimate

CUTS = 50
FEWER = 1.28
"""Standard deviations by which the number let through may fall short of what the fitting records predict."""
HORIZON = 1_000
"""The number of further answers let through that the report predicts errors for."""
MORE = (1, 2, 4, 8)
"""Multiples of the number of certification records that the outlook covers."""


@dataclass(frozen=True)
class RuleCertificate:
    """accuracy: lower bound, at this confidence, for answers let through with score >= threshold. answered, right:
    counts of records. base_right: the right ones among all records, let through or not."""

    accuracy: float
    confidence: float
    threshold: float
    records: int
    answered: int
    right: int
    base_right: int
    lower_bound: float

    @property
    def ceiling(self) -> float:
        """The largest share of prompts that any rule could answer at this accuracy, as measured."""
        return ceiling(self.base_right / self.records, self.accuracy)

    @property
    def share_of_ceiling(self) -> float:
        return self.answered / self.records / self.ceiling

    def horizon(self, answers: int = HORIZON) -> int:
        """The most wrong among this many further answers let through, at the certificate's confidence."""
        return horizon(self.answered - self.right, self.answered, answers, 1 - self.confidence)


@dataclass(frozen=True)
class Outlook:
    """With this many certification records, a certificate for this share of prompts is issued with ENOUGH_POWER, if
    the measured figures are true. share: 0 where none is."""

    records: int
    share: float


@dataclass(frozen=True)
class RuleCertification:
    """prompts: digests of the records, each counted once. refused: how many of them the gate refused. steps: in test
    order; the last may have failed. certificate: None where the first failed."""

    wanted: Claim
    prompts: frozenset[str]
    refused: int
    steps: tuple[Step, ...]
    certificate: RuleCertificate | None
    outlook: tuple[Outlook, ...]

    def rule(self, fitted: AnswerRule) -> AnswerRule:
        """The rule at the certified threshold; without a certificate, at inf, which answers nothing."""
        return fitted.at(self.certificate.threshold if self.certificate else float("inf"))

    def to_json(self) -> dict[str, Any]:
        made = self.certificate
        more = (
            {"ceiling": made.ceiling, "share_of_ceiling": made.share_of_ceiling, "horizon": made.horizon()}
            if made
            else {}
        )
        return {
            **asdict(self.wanted),
            "records": len(self.prompts),
            "refused": self.refused,
            "steps": [asdict(step) for step in self.steps],
            "certificate": asdict(made) | more if made else None,
            "outlook": [asdict(one) for one in self.outlook],
        }


def certify_rule(fitted: FittedRule, certification: RuleRows, wanted: Claim) -> RuleCertification:
    """certification: answers not used to fit, choose or order anything, to prompts drawn as traffic will be. Those
    that could not be scored hold NaN and are not let through. Raises CalibrationError if there are none.
    """
    first = {digest: row for row, digest in reversed(list(enumerate(certification.digests)))}
    if not first:
        raise CalibrationError("no record is left to certify on: add records, or name a file of its own")
    rows = certification[torch.tensor(sorted(first.values()))]
    judged = fitted.rule.judge(rows.prompts, rows.h, rows.figures)
    order = thresholds(fitted)
    begin = start(fitted, order, len(rows), wanted)
    steps = walk(judged, rows.y, order[begin:], wanted)
    passed = [step for step in steps if step.passed]
    certificate = None
    if passed:
        last = passed[-1]
        certificate = RuleCertificate(
            accuracy=wanted.accuracy,
            confidence=1 - wanted.delta,
            threshold=last.threshold,
            records=len(rows),
            answered=last.answered,
            right=last.right,
            base_right=int((rows.y == 1).sum()),
            lower_bound=proven_bound(last, wanted),
        )
    return RuleCertification(
        wanted,
        frozenset(first),
        int((~judged.known).sum()),
        steps,
        certificate,
        outlook(judged, rows.y, order, wanted),
    )


def summary(found: RuleCertification) -> str:
    """A summary for people: the certificate, its share of the ceiling, the horizon, and what more records give."""
    wanted, records, made = found.wanted, len(found.prompts), found.certificate
    asked = f"{wanted.accuracy:g} of the answered right, with confidence {1 - wanted.delta:g}"
    if made is None:
        tried = found.steps[0]
        lines = [f"no certificate on {records} records of {asked}: {tried.right} right of {tried.answered}"]
    else:
        reached = (
            f"no rule can answer more than {made.ceiling:.1%}, {made.share_of_ceiling:.0%} of it reached"
        )
        lines = [
            f"certified on {records} records: {asked} (bound {made.lower_bound:.4f}), on their average",
            f"  answered   {made.answered} ({made.answered / records:.1%}), {made.right} right; {reached}",
            f"  horizon    of the next {HORIZON:,} answered at most {made.horizon()} are wrong",
        ]
    lines.append(f"  refused    {found.refused} prompts before they were answered")
    now = made.answered / records if made else 0.0
    more = next((one for one in found.outlook if one.share > now), None)
    if more is not None:
        lines.append(
            f"  outlook    with {more.records} records {more.share:.1%} answered, were this the truth"
        )
    elif made is None:
        lines.append(
            f"  outlook    even {MORE[-1] * records} records would not bring one, were this the truth"
        )
    return "\n".join(lines)


def thresholds(fitted: FittedRule) -> tuple[float, ...]:
    """CUTS quantiles of the scores that the gate lets pass, descending; the last lets all of them through."""
    scores = fitted.scores[fitted.known].sort(descending=True).values
    cuts = {float(scores[ceil(len(scores) * step / CUTS) - 1]) for step in range(1, CUTS + 1) if len(scores)}
    return tuple(sorted(cuts, reverse=True))


def start(fitted: FittedRule, order: Sequence[float], records: int, wanted: Claim) -> int:
    """The index in `order` to begin at, from what the fitting records predict for this many certification records."""
    powers = []
    for threshold in order:
        answered, right = _count(fitted.scores, fitted.known, fitted.y, threshold)
        share = answered / len(fitted.y)
        # In one case of ten there are fewer. Too few cannot pass, whatever their accuracy.
        expected = round(records * share - FEWER * sqrt(records * share * (1 - share)))
        powers.append(_power(max(0, expected), answered, right, wanted))
    return powers.index(max(powers))


def walk(judged: RuleEstimate, y: Tensor, order: Sequence[float], wanted: Claim) -> tuple[Step, ...]:
    """Tests the thresholds in order until one fails."""
    return fixed_sequence(order, lambda threshold: _count(judged.score, judged.known, y, threshold), wanted)


def outlook(judged: RuleEstimate, y: Tensor, order: Sequence[float], wanted: Claim) -> tuple[Outlook, ...]:
    """For each number of records, the largest share that is then certified with ENOUGH_POWER."""
    found = []
    for times in MORE:
        counts = (_count(judged.score, judged.known, y, threshold) for threshold in reversed(order))
        likely = (n / len(y) for n, right in counts if _power(times * n, n, right, wanted) >= ENOUGH_POWER)
        found.append(Outlook(times * len(y), next(likely, 0.0)))
    return tuple(found)


def _power(expected: int, answered: int, right: int, wanted: Claim) -> float:
    """Power of the test with `expected` answers, if `right` of `answered` is the accuracy; 0 if that is too low."""
    accuracy = (right + 1) / (answered + 2)  # add-one smoothing, since a few right answers are weak evidence
    return power(expected, accuracy, wanted) if accuracy > wanted.accuracy else 0.0


def ceiling(base_accuracy: float, accuracy: float) -> float:
    """The largest share of prompts that any rule could answer, in [0, 1]."""
    return min(1.0, base_accuracy / accuracy)


def horizon(wrong: int, answered: int, further: int, delta: float) -> int:
    """The least u with P(BetaBinomial(further; wrong + 1, answered - wrong) <= u) >= 1 - delta."""
    if not 0 <= wrong < answered or further < 1:
        raise ValueError(
            f"expected 0 <= wrong < answered and further >= 1, got {wrong}, {answered}, {further}"
        )
    a, b, m = wrong + 1.0, float(answered - wrong), further
    u = torch.arange(m + 1, dtype=torch.float64)

    def log_beta(x: Tensor, y: Tensor) -> Tensor:
        return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)

    whole, one = torch.tensor([a, b, m + 1.0], dtype=torch.float64), torch.ones((), dtype=torch.float64)
    log_choose = torch.lgamma(whole[2]) - torch.lgamma(u + 1) - torch.lgamma(m - u + 1)
    terms = log_choose + log_beta(u + a, m - u + b) - log_beta(whole[0] * one, whole[1] * one)
    return int((terms.exp().cumsum(0) < 1 - delta).sum())


def _count(scores: Tensor, known: Tensor, y: Tensor, threshold: float) -> tuple[int, int]:
    """(number let through at the threshold, number right among them)."""
    answered = known & (scores.double() >= threshold) & scores.isfinite()
    return int(answered.sum()), int((y[answered] == 1).sum())
