"""Certifies a whole rule (gate, score and threshold): a lower bound on the accuracy among the answers let through.

The records are used for nothing else; each prompt counts once, with its first answer. The rule at threshold t lets n
through, r of them right; r is Binomial(n, p), p = P(right | let through). Thresholds are tested in an order fixed
beforehand, each at the full delta by the exact binomial test of p < accuracy, and the first failure ends the test
(fixed-sequence testing: Learn then Test, 2110.01052). The last that passed is certified. A false one is certified
with probability at most delta.

    order     CUTS quantiles of cross-validated scores of the fitting records that the gate lets pass, strictest first
    start     where the test is likeliest to pass, if the accuracy there is what those scores say
    cut       at each threshold, of the forecasts below which no answer is begun (`calibration.forecast`), if any

Those scores only fix where to look: if they are wrong, a certificate is missed, not false. The certificate is about
prompts drawn as the certification records were, on average, not about each group among them.

The *ceiling* holds for every rule: with base accuracy b (of the best of a prompt's attempts) and wanted accuracy a,
P(answered) a <= P(answered, right) <= b, so at most b / a is answered and at least ((1 - b) - (1 - a)) / a withheld
(2606.29054). The *horizon*: with k wrong of n, at most u of the next m let through are wrong with confidence 1 -
delta. u is the (1 - delta) quantile of BetaBinomial(m; k + 1, n - k), the prediction of the upper Clopper-Pearson
posterior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from candor.calibration.certificate import ENOUGH_POWER, Claim, Step, fixed_sequence, power, proven_bound
from candor.calibration.errors import CalibrationError
from candor.calibration.fit import Fitted
from candor.calibration.gates import fit_gate, gate_halves
from candor.calibration.generate import Labelled
from candor.calibration.rule import FittedRule, RuleRows, fit_rule, rows_of, with_probabilities
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.strangers import Passing, dealt
from candor.policy.certificate import RuleCertificate, RuleTerms
from candor.policy.judging import TwoGates
from candor.sdm.rule import RuleEstimate

CUTS = 50
FEWER = 1.28
"""Standard deviations by which the number let through may fall short of what the fitting records predict."""
HORIZON = 1_000
"""The number of further answers let through that the report predicts errors for."""
MORE = (1, 2, 4, 8)
"""Multiples of the number of certification records that the outlook covers."""


@dataclass(frozen=True, eq=False)
class RuleParts:
    """How a rule is fitted. parts: h's blocks by name and width. prompt_widths: of the prompt states' blocks.
    strangers: (s, P), states of declared strangers; None: none were. of: as in `strangers.Strangers`."""

    settings: RuleSettings
    parts: Sequence[tuple[str, int]]
    prompt_widths: Sequence[int]
    strangers: Tensor | None = None
    of: Sequence[str | None] = ()


@dataclass(frozen=True)
class Outlook:
    """With this many certification records, a certificate for this share of prompts is issued with ENOUGH_POWER, if
    the measured figures are true. share: 0 where none is."""

    records: int
    share: float


@dataclass(frozen=True)
class Unbegun:
    """Of the certification records: prompts that are known but whose answers are not begun, and how many of these
    answers would be let through, of all that would."""

    prompts: int
    lost: int
    of: int

    @classmethod
    def of_records(cls, drawn: Drawn, threshold: float, forecast_min: float) -> Unbegun:
        """At a certificate's threshold and cut."""
        known, begun = drawn.known.any(dim=1), drawn.through(-torch.inf, forecast_min)[0]
        would, do = drawn.through(threshold)[0], drawn.through(threshold, forecast_min)[0]
        return cls(int((known & ~begun).sum()), int((would & ~do).sum()), int(would.sum()))


@dataclass(frozen=True)
class RuleCertification:
    """alpha: at which the rule serves. prompts: digests of the records, each counted once. base_right: those with a
    right answer among their attempts. refused: how many of them the gate refused. steps: in test order; the last may
    have failed. certificate: None where the first failed. thresholds: how many could have been certified. withheld:
    which of the certification answers the rule withholds, by their index; each prompt's first. unbegun: what is not
    begun; None: all answers are."""

    alpha: float
    wanted: Claim
    prompts: frozenset[str]
    base_right: int
    refused: int
    steps: tuple[Step, ...]
    certificate: RuleCertificate | None
    outlook: tuple[Outlook, ...]
    thresholds: int
    withheld: tuple[int, ...]
    unbegun: Unbegun | None = None

    @property
    def ceiling(self) -> float:
        """The largest share of prompts that any rule could answer at this accuracy, as measured."""
        return ceiling(self.base_right / len(self.prompts), self.wanted.accuracy)

    @property
    def answered(self) -> float:
        """The share of records let through; 0 without a certificate."""
        return self.certificate.answered / len(self.prompts) if self.certificate else 0.0

    @property
    def horizon(self) -> int | None:
        """The most wrong among the next HORIZON answers let through; None without a certificate."""
        made = self.certificate
        if made is None:
            return None
        return horizon(made.answered - made.right, made.answered, HORIZON, self.wanted.delta)

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            **asdict(self.wanted),
            "records": len(self.prompts),
            "refused": self.refused,
            "steps": [asdict(step) for step in self.steps],
            "certificate": asdict(self.certificate) if self.certificate else None,
            "answered": self.answered,
            "ceiling": self.ceiling,
            "share_of_ceiling": self.answered / self.ceiling if self.ceiling else None,
            "horizon": self.horizon,
            "unbegun": asdict(self.unbegun) if self.unbegun else None,
            "outlook": [asdict(one) for one in self.outlook],
        }


def certify_rule(
    fitted: FittedRule, certification: RuleRows, wanted: Claim, alpha: float | None = None, attempts: int = 1
) -> RuleCertification:
    """certification: answers not used to fit, choose or order anything, to prompts drawn as traffic will be. Those
    that could not be scored hold NaN and are not let through. alpha: at which the rule serves; None: the accuracy.
    attempts: rows of each prompt, next to each other; the first let through is served.

    Raises CalibrationError if there are none.
    """
    first = {digest: row for row, digest in reversed(list(enumerate(certification.digests[::attempts])))}
    if not first:
        raise CalibrationError("no record is left to certify on: add records, or name a file of its own")
    distinct = torch.tensor(sorted(first.values()))
    at = (distinct.unsqueeze(1) * attempts + torch.arange(attempts)).flatten()
    rows = certification[at]
    drawn = Drawn.of(fitted.rule.judge(rows.prompts, rows.h, rows.figures), rows.y, attempts)
    found = certify_drawn(
        fitted, drawn, frozenset(first), wanted, wanted.accuracy if alpha is None else alpha
    )
    return replace(found, withheld=tuple(distinct[list(found.withheld)].tolist()))


def certify_drawn(
    fitted: FittedRule, drawn: Drawn, prompts: frozenset[str], wanted: Claim, alpha: float
) -> RuleCertification:
    """The same of records that are judged already. prompts: what names each."""
    order = thresholds(fitted)
    tried = order[start(fitted, order, len(drawn), wanted) :]
    steps = walk(fitted, drawn, tried, wanted)
    passed = [step for step in steps if step.passed]
    base_right = int((drawn.y == 1).any(dim=1).sum())
    certificate = None
    if passed:
        last = passed[-1]
        certificate = RuleCertificate(
            alpha=alpha,
            accuracy=wanted.accuracy,
            confidence=1 - wanted.delta,
            score_min=last.threshold,
            records=len(drawn),
            answered=last.answered,
            right=last.right,
            base_right=base_right,
            lower_bound=proven_bound(last, wanted),
            forecast_min=fitted.forecast_min(last.threshold),
        )
    threshold = passed[-1].threshold if passed else torch.inf
    cut = certificate.forecast_min if certificate else None
    return RuleCertification(
        alpha,
        wanted,
        prompts,
        base_right,
        int((~drawn.known.any(dim=1)).sum()),
        steps,
        certificate,
        outlook(fitted, drawn, order, wanted),
        len(tried),
        tuple((~drawn.through(threshold, cut)[0]).nonzero().flatten().tolist()),
        Unbegun.of_records(drawn, threshold, cut) if cut is not None else None,
    )


@dataclass(frozen=True, eq=False)
class Drawn:
    """n prompts with k attempts each. scores, forecasts, y: (n, k); known: (n, k) bool."""

    scores: Tensor
    known: Tensor
    y: Tensor
    forecasts: Tensor

    @classmethod
    def of(cls, judged: RuleEstimate, y: Tensor, attempts: int = 1) -> Drawn:
        """judged, y: n k rows, the attempts of a prompt next to each other."""
        known = judged.known.view(-1, attempts)
        return cls(
            judged.score.view(-1, attempts),
            known,
            y.view(-1, attempts),
            judged.forecast.view(-1, attempts),
        )

    def __len__(self) -> int:
        return len(self.y)

    def count(self, threshold: float, forecast_min: float | None = None) -> tuple[int, int]:
        """(number of prompts let through at the threshold, number whose first such answer is right)."""
        answered, right = self.through(threshold, forecast_min)
        return int(answered.sum()), int(right.sum())

    def through(self, threshold: float, forecast_min: float | None = None) -> tuple[Tensor, Tensor]:
        """(n,) bool each: whether the prompt is let through, and its first such answer is right. forecast_min: None:
        every answer is begun."""
        through = self.known & (self.scores.double() >= threshold) & self.scores.isfinite()
        if forecast_min is not None:
            through &= self.forecasts.double() >= forecast_min
        first = through.int().argmax(dim=1, keepdim=True)
        answered = through.any(dim=1)
        return answered, answered & (self.y.gather(1, first).squeeze(1) == 1)


@dataclass(frozen=True, eq=False)
class CertifiedRule:
    """A rule as it serves, how its score was fitted, and the search for a certificate at each alpha. records: ids of
    those that it was certified on."""

    gates: TwoGates
    fitted: FittedRule
    searches: tuple[RuleCertification, ...]
    records: tuple[str, ...]
    passing: Passing | None = None

    def withheld(self, search: RuleCertification) -> list[str]:
        """Returns the ids of the certification records that the rule withholds at the search's alpha."""
        return [self.records[index] for index in search.withheld]

    def __str__(self) -> str:
        terms = self.gates.terms
        said = [summary(one) for one in self.searches]
        said.append(
            f"the first gate refuses at most {terms.refused_at_most:.1%} of prompts like those scored here, with "
            f"confidence {terms.confidence:g}"
        )
        return "\n".join([*said, str(self.passing)] if self.passing else said)

    def to_json(self) -> dict[str, Any]:
        terms = asdict(self.gates.terms)
        del terms["certificates"]  # they stand in the searches
        return terms | {
            "declared_strangers": self.passing and self.passing.to_json(),
            "aurc": dict(self.fitted.aurc),
            "reaches": dict(self.fitted.reaches),
            "components": len(self.gates.rule.gate.deviations),
            "reference": len(self.gates.rule.gate.reference),
            "certification": [one.to_json() for one in self.searches],
        }


def certified_rule(
    fitted: Fitted, how: RuleParts, certification: Sequence[Labelled], claims: Mapping[float, Claim]
) -> CertifiedRule:
    """Fits a rule to the answers that the layer was fitted on, and certifies it at each alpha of `claims`.

    certification: answers that neither saw. Raises CalibrationError where no rule can be fitted, or there is none to
    certify on.
    """
    answers = [replace(answer, more=()) for answer in fitted.answers]
    rows = rows_of(fitted.estimator, answers)
    in_calibration = torch.arange(len(answers)) >= len(fitted.training)
    usable = rows.prompts.isfinite().all(dim=1)  # h is, since the layer was fitted on it
    rows, in_calibration = rows[usable], in_calibration[usable]
    taught, held = None, None
    if how.strangers is not None:
        training = {answer.prompt_digest for answer in fitted.training}
        taught, held = dealt(how.strangers, how.of, training, how.settings.seed)
    try:
        found = fit_rule(rows, in_calibration, how.parts, how.prompt_widths, how.settings, taught)
    except ValueError as error:
        raise CalibrationError(f"no rule can be fitted: {error}") from error
    attempts = 1 + len(certification[0].more) if certification else 1
    apart = (
        rows_of(fitted.estimator, certification)
        if certification
        else rows[torch.tensor([], dtype=torch.int64)]
    )
    searches = tuple(certify_rule(found, apart, claim, alpha, attempts) for alpha, claim in claims.items())
    terms = RuleTerms(
        score=found.chosen,
        eps=how.settings.eps,
        refused_at_most=found.refusal_bound,
        confidence=1 - how.settings.delta,
        tokens=sum(answer.tokens for answer in answers) / len(answers),
        strangers=0 if taught is None else len(taught),
        may_lose=how.settings.may_lose,
        certificates=tuple(one.certificate for one in searches if one.certificate is not None),
    )
    rule = with_probabilities(found, apart[torch.arange(0, len(apart), attempts)])
    passing = None
    if taught is not None and held is not None:
        known, reference = gate_halves(rows.prompts, rows.digests, in_calibration)
        alone = fit_gate(known, reference, how.prompt_widths, how.settings)
        passing = Passing(
            len(taught),
            len(held),
            gate_alone=int(alone.known(alone.distance(held)).sum()),
            both=int(found.rule.know(held).known.sum()),
        )
    records = tuple(answer.id for answer in certification)
    return CertifiedRule(TwoGates(rule, terms), found, searches, records, passing)


def summary(found: RuleCertification) -> str:
    """A summary for people: the certificate, its share of the ceiling, the horizon, and what more records give."""
    wanted, records, made = found.wanted, len(found.prompts), found.certificate
    asked = f"{wanted.accuracy:g} of the answered right, with confidence {1 - wanted.delta:g}"
    if made is None:
        tried = found.steps[0]
        lines = [
            f"alpha {found.alpha:g}: no certificate on {records} records of {asked}: {tried.right} right of "
            f"{tried.answered}; nothing is answered"
        ]
    else:
        share = found.answered / found.ceiling
        reached = f"no rule can answer more than {found.ceiling:.1%}, {share:.0%} of it reached"
        lines = [
            f"alpha {found.alpha:g}: certified on {records} records: {asked}, on their average "
            f"(bound {made.lower_bound:.4f})",
            f"  answered   {made.answered} ({made.answered / records:.1%}), {made.right} right; {reached}",
            f"  horizon    of the next {HORIZON:,} answered at most {found.horizon} are wrong",
        ]
    lines.append(f"  refused    {found.refused} prompts before they were answered")
    if found.unbegun is not None:
        lines.append(
            f"  not begun  {found.unbegun.prompts} answers whose prompts promise too low a score; "
            f"{found.unbegun.lost} of {found.unbegun.of} that would be let through are lost"
        )
    more = next((one for one in found.outlook if one.share > found.answered), None)
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
    forecasts = torch.full_like(fitted.scores, torch.inf) if fitted.forecasts is None else fitted.forecasts
    seen = Drawn(*(one.unsqueeze(1) for one in (fitted.scores, fitted.known, fitted.y, forecasts)))
    powers = []
    for threshold in order:
        answered, right = seen.count(threshold, fitted.forecast_min(threshold))
        share = answered / len(fitted.y)
        # In one case of ten there are fewer. Too few cannot pass, whatever their accuracy.
        expected = round(records * share - FEWER * sqrt(records * share * (1 - share)))
        powers.append(_power(max(0, expected), answered, right, wanted))
    return powers.index(max(powers))


def walk(fitted: FittedRule, drawn: Drawn, order: Sequence[float], wanted: Claim) -> tuple[Step, ...]:
    """Tests the thresholds in order, each with its cut, until one fails."""
    return fixed_sequence(
        order, lambda threshold: drawn.count(threshold, fitted.forecast_min(threshold)), wanted
    )


def outlook(fitted: FittedRule, drawn: Drawn, order: Sequence[float], wanted: Claim) -> tuple[Outlook, ...]:
    """For each number of records, the largest share that is then certified with ENOUGH_POWER."""
    found = []
    for times in MORE:
        counts = (drawn.count(threshold, fitted.forecast_min(threshold)) for threshold in reversed(order))
        likely = (
            n / len(drawn) for n, right in counts if _power(times * n, n, right, wanted) >= ENOUGH_POWER
        )
        found.append(Outlook(times * len(drawn), next(likely, 0.0)))
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
