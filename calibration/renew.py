"""The next bundle, from labels on answers that its predecessor judged.

    audits       a sample of the traffic, each drawn with a probability that was fixed before its label
      thinned    kept with probability c / pi, c the least pi that any could have had: in what is kept every answer
                 had the same chance, so the exact binomial test of `rule_certificate` holds of it
      dealt      by lot, one by one: CERTIFY of them certify, half of the rest measures, the other half teaches
    other labels (withheld ones that somebody looked up, disputed ones, audits that thinning left out)    teach

    support      the old exemplars, and what teaches, with its text; a prompt that comes again takes its new label
    distances, regions, gates, score, thresholds   from the audits that teach and measure
    certificate  from the audits that certify, and from nothing else

The layer's weights stay: h' of the old support remain what they are. What nobody could label counts as wrong where it
certifies and is not learnt from; what was refused unwritten counts as let through and wrong wherever the new gate
would have it answered. Each audit is one draw from the traffic, so a prompt that comes often counts often, unlike in
`calibrate`, whose records are no traffic. The lot looks at nothing but an answer's name.

Weighting by 1 / pi would keep more of the sample, but its exact bounds are bets on a ratio, and a certificate's
counts would no longer be counts. Whoever draws all audits with one share loses nothing by thinning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil, log
from random import Random
from typing import Any

import torch
from torch import Tensor

from candor.calibration.certificate import Certification, Claim, certify
from candor.calibration.certificate import summary as of_regions
from candor.calibration.data import prompt_digest
from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled, scorable
from candor.calibration.report import SCHEMA_VERSION
from candor.calibration.rule import RuleRows, fit_rule, rows_of, with_probabilities
from candor.calibration.rule_certificate import Drawn, RuleCertification, certify_drawn, summary
from candor.calibration.rule_settings import RuleSettings
from candor.model_store.bundle import Bundle, Exemplar
from candor.model_store.manifest import Manifest
from candor.policy.certificate import RuleTerms
from candor.policy.judging import TwoGates
from candor.sdm.adaptor import FrozenAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.rule import AnswerRule
from candor.sdm.support import Support

CERTIFY = 0.5
"""Share of the thinned audits that certify."""
FEWEST = 20
"""Fewest audits with a label of each kind to fit gates and score on."""


@dataclass(frozen=True, eq=False)
class Audited:
    """An answer that was drawn from the traffic. answer: with label 0 and `unknown` where nobody could label it.

    probability: pi, with which it was drawn. least: the least that it could have been. time: Unix time in s.
    unwritten: its prompt was refused before it was answered, so it has no h.
    """

    answer: Labelled
    probability: float
    least: float
    time: float
    unwritten: bool = False


@dataclass(frozen=True, eq=False)
class Parts:
    """The audits as they are used. thinned_out: not kept, so they only teach the support."""

    certifying: list[Audited]
    measuring: list[Audited]
    teaching: list[Audited]
    thinned_out: list[Audited]

    @property
    def kept(self) -> list[Audited]:
        return [*self.certifying, *self.measuring, *self.teaching]


@dataclass(frozen=True, eq=False)
class Renewed:
    """The new bundle, not yet published. said: what changed and why, for people."""

    manifest: Manifest
    estimator: SDMEstimator
    exemplars: tuple[Exemplar, ...]
    report: dict[str, Any]
    rule: AnswerRule | None
    said: str


def deal(audits: Sequence[Audited], certify: float = CERTIFY, seed: int = 0) -> Parts:
    """Thins and deals audits by lots that depend on the seed and an answer's name alone."""
    least = min((one.least for one in audits), default=1.0)
    parts = Parts([], [], [], [])
    for one in audits:
        lots = Random(f"{seed} {one.answer.id}")
        kept, share = lots.random() < least / one.probability, lots.random()
        if not kept:
            parts.thinned_out.append(one)
        elif share < certify:
            parts.certifying.append(one)
        elif share < certify + (1 - certify) / 2:
            parts.measuring.append(one)
        else:
            parts.teaching.append(one)
    return parts


def renew(
    old: Bundle,
    audits: Sequence[Audited],
    others: Sequence[Labelled] = (),
    *,
    certify_share: float = CERTIFY,
    seed: int = 0,
    lineage: Mapping[str, Any] | None = None,
) -> Renewed:
    """Makes the bundle that follows `old`. audits: all fresh, that is, of answers given after it was made. others:
    further labelled answers. lineage: added to what the manifest says of its origin.

    Raises CalibrationError where there are too few labels, or nothing can be certified.
    """
    parts = deal(audits, certify_share, seed)
    _require_enough(old, audits, parts)
    teaching, measuring = ([one.answer for one in part] for part in (parts.teaching, parts.measuring))
    teaching, measuring = _fit_for_use(teaching), _fit_for_use(measuring)
    taught = [*teaching, *_fit_for_use([*(one.answer for one in parts.thinned_out), *others])]
    support, exemplars, changes = _support(old, [one for one in taught if one.messages])
    estimator = old.estimator.recalibrated(
        support,
        torch.stack([one.h for one in measuring]),
        torch.tensor([one.label for one in measuring]),
        old.manifest.alphas,
    )
    rule: TwoGates | None = None
    searches: tuple[RuleCertification, ...] = ()
    certification: Certification | None = None
    if old.rule is not None:
        rule, searches = _renewed_rule(old, old.rule, estimator, teaching, measuring, parts.certifying, seed)
    elif old.certificates:
        claim = Claim(old.certificates[0].accuracy, 1 - old.certificates[0].confidence)
        # Each audit is a draw of its own, so each counts under its own name.
        drawn = [replace(one.answer, prompt_digest=one.answer.id) for one in parts.certifying]
        certification = certify(estimator, measuring, drawn, claim)
    _require_certified(old, searches, certification)
    compared = _compared(old, estimator, rule, parts.certifying)
    used = [one.answer for one in parts.kept] + taught
    origin = {
        "parent": old.digest,
        "from": _said_time(min(one.time for one in audits)),
        "until": _said_time(max(one.time for one in audits)),
        "audits": len(audits),
        "unlabelled": sum(one.answer.unknown for one in audits),
        "unwritten": sum(one.unwritten for one in audits),
        "thinned_out": len(parts.thinned_out),
        "certifying": len(parts.certifying),
        "measuring": len(measuring),
        "teaching": len(teaching),
        "other_labels": len(others),
        "support": changes,
        "seed": seed,
        **(lineage or {}),
    }
    report = {
        "schema_version": SCHEMA_VERSION,
        "counts": {"training_half": _counts(taught or measuring), "calibration_half": _counts(measuring)},
        "recalibration": origin | {"decisions": compared},
        "certification": certification and certification.to_json(),
        "rule": None
        if rule is None
        else {"aurc": None, "certification": [one.to_json() for one in searches]},
        "reference_abstention_ratio": {},
        "reference_abstention_ratio_of_rule": {str(one.alpha): 1 - one.answered for one in searches},
        "calibration_prompts": sorted({one.prompt_digest for one in measuring}),
        "fitted_prompts": sorted(
            {*old.report.get("fitted_prompts", []), *(one.prompt_digest for one in used if one.messages)}
        ),
    }
    manifest = replace(
        old.manifest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        certificates=certification.certificates if certification else (),
        rule=rule.terms if rule else None,
        cascade=None,  # audits do not say what the other model would have answered
        provenance={"lineage": origin, "before": old.manifest.provenance},
        files={},
    )
    said = _summary(old, origin, searches, certification, compared)
    return Renewed(manifest, estimator, exemplars, report, rule.rule if rule else None, said)


def _fit_for_use(answers: Sequence[Labelled]) -> list[Labelled]:
    """Those that can be learnt from: labelled, and with whole states."""
    return [one for one in scorable(answers) if not one.unknown]


def _support(old: Bundle, taught: Sequence[Labelled]) -> tuple[Support, tuple[Exemplar, ...], dict[str, int]]:
    """The old support, without exemplars whose prompt was labelled anew, and what was taught behind it."""
    support, last = old.estimator.support, {one.prompt_digest: one for one in taught}
    stays = [prompt_digest(one.messages) not in last for one in old.exemplars]
    added = list(last.values())
    changes = {"added": len(added), "replaced": len(stays) - sum(stays)}
    rows = torch.tensor(stays)
    kept = (
        Support(support.h_prime[rows], support.labels[rows], support.predictions[rows])
        if any(stays)
        else None
    )
    exemplars = [one for one, stay in zip(old.exemplars, stays, strict=True) if stay]
    if not added:
        return support, tuple(exemplars), changes
    h_prime, _, y_hat, _ = FrozenAdaptor(old.estimator.adaptor)(torch.stack([one.h for one in added]))
    labels = torch.tensor([one.label for one in added])
    made = kept.updated(h_prime, labels, y_hat) if kept else Support(h_prime.float(), labels, y_hat)
    exemplars += [
        Exemplar(one.id, one.label, prediction, one.messages, one.response)
        for one, prediction in zip(added, y_hat.tolist(), strict=True)
    ]
    return made, tuple(exemplars), changes


def _renewed_rule(
    old: Bundle,
    gates: TwoGates,
    estimator: SDMEstimator,
    teaching: Sequence[Labelled],
    measuring: Sequence[Labelled],
    certifying: Sequence[Audited],
    seed: int,
) -> tuple[TwoGates, tuple[RuleCertification, ...]]:
    representation, hidden = old.manifest.representation, old.manifest.model.hidden_size
    terms = gates.terms
    rows = rows_of(estimator, [*teaching, *measuring])
    in_measuring = torch.arange(len(rows)) >= len(teaching)
    usable = rows.prompts.isfinite().all(dim=1)
    try:
        fitted = fit_rule(
            rows[usable],
            in_measuring[usable],
            representation.parts(hidden),
            (hidden, hidden),
            RuleSettings(eps=terms.eps, delta=1 - terms.confidence, seed=seed, may_lose=terms.may_lose),
            probe_weight=gates.rule.probe.weight if gates.rule.probe else None,
        )
    except ValueError as error:
        raise CalibrationError(f"no rule can be fitted: {error}") from error
    drawn_rows = rows_of(estimator, [one.answer for one in certifying])
    drawn = _drawn(fitted.rule, drawn_rows, certifying)
    names = frozenset(one.answer.id for one in certifying)
    searches = tuple(
        certify_drawn(fitted, drawn, names, claim, alpha) for alpha, claim in _claims(old, terms).items()
    )
    made = replace(
        terms,
        score=fitted.chosen,
        refused_at_most=fitted.refusal_bound,
        certificates=tuple(one.certificate for one in searches if one.certificate is not None),
    )
    labelled = torch.tensor([not one.answer.unknown and not one.unwritten for one in certifying])
    return TwoGates(with_probabilities(fitted, drawn_rows[labelled]), made), searches


def _claims(old: Bundle, terms: RuleTerms) -> dict[float, Claim]:
    """What is to be certified at each alpha: what was, or alpha itself where nothing was."""
    claims = {}
    for alpha in old.manifest.alphas:
        before = terms.at(alpha)
        delta = 1 - (before.confidence if before else terms.confidence)
        claims[alpha] = Claim(before.accuracy if before else alpha, delta)
    return claims


def _drawn(rule: AnswerRule, rows: RuleRows, audits: Sequence[Audited]) -> Drawn:
    """The audits judged. What was refused unwritten is let through at every threshold, unless the rule refuses its
    prompt."""
    judged = rule.judge(rows.prompts, rows.h, rows.figures)
    unwritten = torch.tensor([one.unwritten for one in audits])
    score = judged.score.where(~unwritten, torch.finfo(torch.float32).max)
    unread = unwritten & ~rows.prompts.isfinite().all(dim=1)
    known, forecast = judged.known | unread, judged.forecast.where(~unread, torch.inf)
    return Drawn.of(replace(judged, score=score, known=known, forecast=forecast), rows.y)


def _compared(
    old: Bundle, estimator: SDMEstimator, rule: TwoGates | None, certifying: Sequence[Audited]
) -> dict[str, Any]:
    """Of the audits that certify, by alpha and both bundles' decisions: how many, and how many of them are right."""
    if old.rule is None or rule is None:
        return {}
    answers = [one.answer for one in certifying]
    before = _drawn(old.rule.rule, rows_of(old.estimator, answers), certifying)
    after = _drawn(rule.rule, rows_of(estimator, answers), certifying)
    found: dict[str, Any] = {}
    for alpha in old.manifest.alphas:
        through = [
            _through(drawn, one.at(alpha)) for drawn, one in ((before, old.rule.terms), (after, rule.terms))
        ]
        cells = {}
        for (was, said_old), (now, said_new) in (
            (one, other)
            for one in ((True, "answered"), (False, "abstained"))
            for other in ((True, "answered"), (False, "abstained"))
        ):
            cell = (through[0] == was) & (through[1] == now)
            right = int((before.y[:, 0][cell] == 1).sum())
            cells[f"{said_old}, then {said_new}"] = {"records": int(cell.sum()), "right": right}
        found[str(alpha)] = cells
    return found


def _through(drawn: Drawn, certificate: Any) -> Tensor:
    """(n,) bool: what a certified rule lets through; nothing without a certificate."""
    if certificate is None:
        return torch.zeros(len(drawn), dtype=torch.bool)
    through: Tensor = certificate.covers(drawn.known[:, 0], drawn.scores[:, 0], drawn.forecasts[:, 0])
    return through


def _require_enough(old: Bundle, audits: Sequence[Audited], parts: Parts) -> None:
    """Raises CalibrationError where no certificate could come of so few."""
    if not audits:
        raise CalibrationError(
            "there is no audit to certify on: expected answers that were drawn for an audit after the bundle was "
            "made (CANDOR_AUDIT_SHARE), with a reviewer's label"
        )
    fitting = [one.answer for one in (*parts.measuring, *parts.teaching)]
    right = sum(one.label == 1 for one in _fit_for_use(fitting))
    wrong = len(_fit_for_use(fitting)) - right
    claims = _claims(old, old.rule.terms).values() if old.rule else []
    needed = min((ceil(log(claim.delta) / log(claim.accuracy)) for claim in claims), default=1)
    labelled = sum(not one.answer.unknown for one in parts.certifying)
    if labelled < needed or min(right, wrong) < FEWEST:
        raise CalibrationError(
            f"too few labels: of {len(audits)} audits {sum(one.answer.unknown for one in audits)} have no label, and "
            f"{len(parts.thinned_out)}, drawn more readily than others, are left out by lot; {labelled} are left to "
            f"certify on, where at least {needed} are needed, and {right} right and {wrong} wrong to fit on, where "
            f"{FEWEST} of each are. Label more audits"
        )


def _require_certified(
    old: Bundle, searches: Sequence[RuleCertification], certification: Certification | None
) -> None:
    promised = old.rule.terms.certificates if old.rule else old.certificates
    found = [one for one in searches if one.certificate] or (certification and certification.certificates)
    if promised and not found:
        said = "\n".join(summary(one) for one in searches)
        raise CalibrationError(
            f"nothing can be certified on these audits, so no bundle is made. Label more of them.\n{said}".rstrip()
        )


def _summary(
    old: Bundle,
    origin: Mapping[str, Any],
    searches: Sequence[RuleCertification],
    certification: Certification | None,
    compared: Mapping[str, Any],
) -> str:
    lines = [
        f"from {old.manifest.name} {old.digest[:12]}, by answers given from {origin['from']} to {origin['until']}",
        f"  audits     {origin['audits']}, {origin['unlabelled']} without a label, {origin['thinned_out']} left out "
        f"by lot; {origin['certifying']} certify, {origin['measuring']} measure, {origin['teaching']} teach",
        f"  support    {origin['support']['added']} exemplars added, {origin['support']['replaced']} replaced; "
        f"{origin['other_labels']} labels beside the audits",
    ]
    for one in searches:
        before = old.rule.terms.at(one.alpha) if old.rule else None
        lines.append(summary(one))
        if before is not None:
            lines.append(
                f"  before     scores from {before.score_min:.2f}, {before.answered / before.records:.1%} answered "
                f"when certified (bound {before.lower_bound:.4f})"
            )
        cells = compared.get(str(one.alpha), {})
        told = (f"{cell}: {found['records']} ({found['right']} right)" for cell, found in cells.items())
        lines.append(f"  decisions  on the audits that certify: {'; '.join(told)}")
    if certification is not None:
        lines.append(of_regions(certification))
    return "\n".join(lines)


def _counts(answers: Sequence[Labelled]) -> dict[str, float]:
    right = sum(one.label for one in answers)
    return {"records": len(answers), "correct": right, "base_rate": right / len(answers)}


def _said_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
