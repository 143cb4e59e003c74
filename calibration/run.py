"""The steps of calibration, from files to a published bundle, and of evaluation, from a bundle to its figures.

    read and check every file        before the engine starts
    answer and label                 cached, so a killed run resumes here
    set aside the certification part or take it from its own file; without two gates, where a certificate is wanted
    set aside the held-out part      or take it from its own files
    fit on the rest                  J rounds of the layer, then the two-gate rule
    certify                          what is let through
    escalate                         what it withholds, where another model is to answer it; certify both together
    evaluate on the held-out part    reports only
    publish                          atomic: a bundle or nothing

`calibration.answering` reads and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from candor.calibration.advice import Advice, advise
from candor.calibration.agreement import Agreement
from candor.calibration.answering import Answers, Inputs, require_inputs_calibrated
from candor.calibration.cascade import Cascade, Escalating, certify_cascade
from candor.calibration.certificate import Certification, Claim, certify
from candor.calibration.early import require_disk, require_enough, require_writable, try_verifiers
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.evaluate import Evaluation, evaluate
from candor.calibration.fit import (
    FitSettings,
    Fitted,
    fit,
    set_aside,
    set_aside_for_certification,
    standardisation_blocks,
)
from candor.calibration.generate import Labelled, encode_prompts
from candor.calibration.report import build_report
from candor.calibration.rule_certificate import CertifiedRule, RuleParts, certified_rule
from candor.calibration.rule_settings import RuleSettings
from candor.engine.base import AdapterIdentity, ModelIdentity, Representation
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle, Exemplar
from candor.model_store.manifest import Manifest
from candor.model_store.store import publish
from candor.policy.certificate import Certificate
from candor.policy.judging import TwoGates
from candor.policy.policy import Policy
from candor.sdm.adaptor import Block

CLASS_NAMES = ("does not follow the instruction", "follows the instruction")

HELD_OUT_SHARE = 0.2
"""Share of the records that is held out where no held-out file is given."""


def require_free(out: Path) -> None:
    """Raises CalibrationError where no new bundle can be published, so that no hours of work are lost."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CalibrationError(f"{out} exists already; give another --out, or move it away first")


RULE_SHARE = 0.4
REGION_SHARE = 0.2
"""Default shares of the prompts to certify on. A rule's order of thresholds is cross-validated, which leaves more."""


@dataclass(frozen=True)
class Certifying:
    """accuracy: the least to certify; None: a rule's alphas alone say, and no region is certified. share: of the
    prompts, set aside to certify where no certification file is given. agreement: of the verifier with people, by
    whose labels the accuracy then is. Raises ValueError out of range."""

    accuracy: float | None
    delta: float
    share: float
    agreement: Agreement | None = None

    def __post_init__(self) -> None:
        Claim(0.5 if self.accuracy is None else self.accuracy, self.delta)  # raises out of range
        if not 0 < self.share < 1:
            raise ValueError(f"the share to certify on must be between 0 and 1, got {self.share}")

    @classmethod
    def of(
        cls, accuracy: float | None, delta: float, share: float | None, *, rule: bool
    ) -> Certifying | None:
        """Returns what to certify; None: nothing. share: None: the default. rule: whether there are two gates."""
        if accuracy is None and not rule:
            return None
        default = RULE_SHARE if rule else REGION_SHARE
        return cls(accuracy, delta, default if share is None else share)

    @property
    def of_regions(self) -> Claim | None:
        """What is to be certified of every region; None: nothing."""
        return None if self.accuracy is None else self._by_verifier(Claim(self.accuracy, self.delta))

    def of_rule(self, alpha: float) -> Claim:
        """What is to be certified of the rule at alpha: that accuracy, or the least that was asked for."""
        return self._by_verifier(Claim(max(alpha, self.accuracy or 0.0), self.delta))

    def claims(self, rule_alphas: Sequence[float]) -> list[Claim]:
        """All of them. Raises CalibrationError where the verifier agrees too little with people."""
        regions = [] if self.of_regions is None else [self.of_regions]
        return regions + [self.of_rule(alpha) for alpha in rule_alphas]

    def _by_verifier(self, wanted: Claim) -> Claim:
        return wanted if self.agreement is None else self.agreement.by_verifier(wanted)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of calibration, before anything is published. report: the bundle's report.json. held_out: the
    answers that `evaluation` is about."""

    settings: FitSettings
    fitted: Fitted
    certification: Certification | None
    rule: CertifiedRule | None
    evaluation: Evaluation
    report: dict[str, Any]
    advice: Advice
    held_out: Sequence[Labelled]
    cascade: Cascade | None = None

    @property
    def gates(self) -> TwoGates | None:
        return self.rule.gates if self.rule else None

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        return self.certification.certificates if self.certification else ()


@dataclass(frozen=True, eq=False)
class Made:
    """A published bundle. outcome: with its figures on the held-out part."""

    digest: str
    outcome: Outcome


def require_possible(
    chat: ChatFormat,
    inputs: Inputs,
    policy: Policy,
    representation: Representation,
    settings: FitSettings,
    certifying: Certifying | None,
    out: Path,
    cache: Path,
    *,
    hidden_size: int,
    max_model_len: int,
) -> None:
    """Raises CalibrationError for all that would otherwise fail after the last answer."""
    width = sum(representation.block_sizes(hidden_size))
    require_writable(out.parent, "the bundle's folder")
    require_writable(cache, "the cache")
    require_disk(cache, sum(len(file.records) for file in inputs.files), width, policy)
    require_enough(
        inputs.fitting.records,
        min(settings.alphas),
        certifying.share if certifying and not inputs.certification else 0,
        0 if inputs.held_out else HELD_OUT_SHARE,
        str(inputs.fitting.path),
    )
    require_inputs_calibrated(chat, inputs, policy, representation.tag)
    for file in inputs.files:
        encode_prompts(max_model_len, chat, file.records, policy)
        try_verifiers(file.records, cache)


def make_bundle(
    inputs: Inputs,
    answers: Answers,
    settings: FitSettings,
    out: Path,
    name: str,
    certifying: Certifying | None = None,
    rule: RuleSettings | None = None,
    escalating: Escalating | None = None,
) -> Made:
    """Fits, certifies, evaluates, publishes. certifying: None where no certificate is wanted, without a rule.
    rule: None: the papers' regions alone. escalating: None where no other model answers what the rule withholds.

    Raises CalibrationError or BundleError; then nothing is left at `out`.
    """
    hidden = answers.model.hidden_size
    with tqdm(total=settings.rounds * settings.epochs, desc="training", unit="epoch") as bar:
        outcome = calibrate_answers(
            answers.fitting,
            standardisation_blocks(answers.representation, hidden),
            settings,
            certifying,
            RuleParts(
                rule,
                answers.representation.parts(hidden),
                (hidden, hidden),
                answers.strangers,
                inputs.strangers.of if inputs.strangers else (),
            )
            if rule
            else None,
            held_out=answers.held_out,
            certification=answers.certification,
            progress=bar.update,
        )
    if escalating is not None and certifying is not None and outcome.rule is not None:
        records = {record.id: record for record in (inputs.certification or inputs.fitting).records}
        cascade = certify_cascade(
            outcome.rule, records, answers.policy, escalating, certifying.delta, certifying.agreement
        )
        outcome = replace(outcome, cascade=cascade)
        outcome.report["cascade"] = cascade.to_json()
    if inputs.strangers is not None:
        fitted = outcome.report["fitted_prompts"]
        outcome.report["fitted_prompts"] = sorted({*fitted, *inputs.strangers.digests})
    data = {
        "data": inputs.fitting.to_json(),
        "strangers": inputs.strangers and inputs.strangers.to_json(),
        "rule": rule and rule.to_json(),
        "certification_data": inputs.certification and inputs.certification.to_json(),
        "certification_share": certifying.share if certifying and not inputs.certification else None,
        "held_out_data": [file.to_json() for file in inputs.held_out],
        "held_out_share": None if inputs.held_out else HELD_OUT_SHARE,
    }
    digest = publish_outcome(
        out, outcome, name, answers.model, answers.adapter, answers.representation, answers.policy, data
    )
    return Made(digest, outcome)


def calibrate_answers(
    answers: Sequence[Labelled],
    blocks: tuple[Block, ...],
    settings: FitSettings,
    certifying: Certifying | None = None,
    rule: RuleParts | None = None,
    *,
    held_out: Sequence[Labelled] = (),
    certification: Sequence[Labelled] = (),
    progress: Callable[[int], object],
) -> Outcome:
    """Fits, certifies and evaluates; publishes nothing.

    rule: None: the papers' regions alone. Otherwise certifying says what of it to certify, and is not None.
    held_out, certification: answers for these purposes; where there are none, a part of `answers` is set aside.
    progress: called with the number of epochs done since the last call. Raises CalibrationError.
    """
    fitting, reporting, apart = list(answers), list(held_out), list(certification)
    unknown = sum(one.unknown for one in (*fitting, *reporting, *apart))
    if certifying is not None and not apart:
        fitting, apart = set_aside_for_certification(fitting, certifying.share, settings.seed)
    if not reporting:
        fitting, reporting = set_aside(fitting, HELD_OUT_SHARE, settings.seed)
    if not reporting:
        raise DataError("no record is left for the held-out part: add records, or give a file with --test")
    # Nobody said that these are right: they are not learnt from, and count as wrong where figures are reported.
    fitting = [one for one in fitting if not one.unknown]
    fitted = fit(fitting, blocks, settings, progress)
    certified = None
    if certifying is not None and certifying.of_regions is not None:
        certified = certify(fitted.estimator, fitted.calibration, apart, certifying.of_regions)
    certified_gates = None
    if rule is not None:
        assert certifying is not None
        claims = {alpha: certifying.of_rule(alpha) for alpha in settings.alphas}
        certified_gates = certified_rule(fitted, rule, apart, claims)
    gates = certified_gates.gates if certified_gates else None
    evaluation = evaluate(fitted.estimator, reporting, settings.alphas, settings.seed, gates)
    report = build_report(fitted, settings, fitting, reporting, evaluation, certified, certified_gates)
    report["counts"]["unknown_labels"] = unknown
    if certifying is not None and certifying.agreement is not None:
        report["agreement_with_people"] = certifying.agreement.to_json()
    advice = advise(fitted, fitting, evaluation, certified_gates.searches if certified_gates else None)
    report["advice"] = advice.to_json()
    return Outcome(settings, fitted, certified, certified_gates, evaluation, report, advice, reporting)


def publish_outcome(
    out: Path,
    outcome: Outcome,
    name: str,
    model: ModelIdentity,
    adapter: AdapterIdentity | None,
    representation: Representation,
    policy: Policy,
    data: Mapping[str, Any],
) -> str:
    """Publishes; returns the bundle's digest. data: origin of the answers, for its provenance. Raises BundleError."""
    fitted, settings = outcome.fitted, outcome.settings
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        adapter=adapter,
        representation=representation,
        policy=policy,
        alphas=settings.alphas,
        class_names=CLASS_NAMES,
        passed_over=settings.passed_over,
        certificates=outcome.certificates,
        rule=outcome.gates.terms if outcome.gates else None,
        cascade=outcome.cascade.terms if outcome.cascade else None,
        provenance={**data, "counts": outcome.report["counts"], "settings": settings.to_json()},
    )
    predictions = fitted.estimator.support.predictions.tolist()
    exemplars = [
        Exemplar(answer.id, answer.label, prediction, answer.messages, answer.response)
        for answer, prediction in zip(fitted.training, predictions, strict=True)
    ]
    return publish(
        out,
        manifest,
        fitted.estimator,
        exemplars,
        outcome.report,
        outcome.gates.rule if outcome.gates else None,
    )


def evaluate_sets(
    bundle: Bundle, answers: Mapping[str, Sequence[Labelled]], seed: int = 0
) -> dict[str, Evaluation]:
    """Evaluates a bundle on answers to named sets, at its own alphas."""
    return {
        name: evaluate(bundle.estimator, some, bundle.manifest.alphas, seed, bundle.rule)
        for name, some in answers.items()
    }
