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

The caller passes the engine; the same engine serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations, product
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from candor.calibration.advice import Advice, advise
from candor.calibration.agreement import Agreement
from candor.calibration.cache import AnswerCache
from candor.calibration.cascade import Cascade, Escalating, certify_cascade
from candor.calibration.certificate import Certification, Claim, certify
from candor.calibration.data import Loaded, Record, earlier_prompt_digest, load, require_disjoint
from candor.calibration.decisions import DecisionRecord, decide_records, load_decisions
from candor.calibration.early import Watch, require_disk, require_enough, require_writable, try_verifiers
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
from candor.calibration.generate import (
    Labelled,
    collect,
    count_faults,
    encode_prompts,
    require_calibrated,
)
from candor.calibration.generate import Watch as Watching
from candor.calibration.labels import ask_person, verifier_of
from candor.calibration.report import build_report
from candor.calibration.rule_certificate import CertifiedRule, RuleParts, certified_rule
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.shapes import Reading
from candor.calibration.strangers import Strangers, load_strangers, read_strangers
from candor.calibration.verifiers import without_folders
from candor.engine.base import AdapterIdentity, Engine, ModelIdentity, Representation
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


@dataclass(frozen=True)
class DataFile:
    """A file of records that was read and checked. sha256: of its bytes. loaded: how it was understood."""

    path: Path
    records: Sequence[Record]
    sha256: str
    loaded: Loaded | None = None

    @classmethod
    def load(cls, path: Path, reading: Reading | None = None) -> DataFile:
        """Raises DataError."""
        found = load(path, reading)
        return cls(path, found.records, found.rows.sha256, found)

    @classmethod
    def load_decisions(cls, path: Path, chat: ChatFormat) -> DataFile:
        """Of labelled questions. Raises DataError."""
        return cls(path, *load_decisions(path, chat))

    def to_json(self) -> dict[str, Any]:
        """JSON without folders, which would reveal the machine."""
        verifiers = {without_folders(record.verifier) for record in self.records if record.verifier}
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "records": len(self.records),
            "given_responses": sum(record.response is not None for record in self.records),
            **({"unknown_labels": self.loaded.unknown} if self.loaded and self.loaded.unknown else {}),
            "verifiers": sorted(verifiers),
        }


@dataclass(frozen=True)
class Inputs:
    """fitting: the file to fit on. held_out: files that only report; empty: a part of `fitting` is used.
    certification: the file to certify on; None: a part of `fitting` is used, where a certificate is wanted.
    strangers: conversations that are to be refused."""

    fitting: DataFile
    held_out: tuple[DataFile, ...]
    certification: DataFile | None = None
    strangers: Strangers | None = None

    @classmethod
    def load(
        cls,
        fitting: Path,
        held_out: Sequence[Path],
        certification: Path | None = None,
        strangers: Path | None = None,
        reading: Reading | None = None,
        questions_for: ChatFormat | None = None,
    ) -> Inputs:
        """questions_for: the files hold labelled questions, to be put to this format's model; None: conversations.

        Raises DataError, also where a prompt is in files with different purposes.
        """

        def load(path: Path) -> DataFile:
            if questions_for is not None:
                return DataFile.load_decisions(path, questions_for)
            return DataFile.load(path, reading)

        inputs = cls(
            load(fitting),
            tuple(map(load, held_out)),
            None if certification is None else load(certification),
        )
        if strangers is not None:
            records = [record for file in inputs.files for record in file.records]
            inputs = replace(inputs, strangers=load_strangers(strangers, records))
        purposes = [[inputs.fitting], [inputs.certification] if inputs.certification else [], inputs.held_out]
        for one, other in combinations(purposes, 2):
            for file, against in product(one, other):
                require_disjoint(file.path, file.records, against.path, against.records)
        return inputs

    @property
    def files(self) -> list[DataFile]:
        return [self.fitting, *self.held_out, *([self.certification] if self.certification else [])]


@dataclass(frozen=True)
class AnsweringOptions:
    """How the engine is asked: the cache's folder, the number of records in flight, the seed of sampling.

    relabel: asks verifiers again whose verdicts are kept. person: somebody is at the terminal, and is asked about
    what no verifier could label. review: ids of records whose labels somebody at the terminal looks at.
    prompt_states: as in `generate.collect`.
    """

    cache: Path
    concurrency: int
    seed: int = 0
    relabel: bool = False
    person: bool = False
    review: frozenset[str] = frozenset()
    prompt_states: bool = True


def require_free(out: Path) -> None:
    """Raises CalibrationError where no new bundle can be published, so that no hours of work are lost."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CalibrationError(f"{out} exists already; give another --out, or move it away first")


@dataclass(frozen=True, eq=False)
class Answers:
    """All answers of the engine, and its identity; the engine is no longer needed after this.

    held_out: empty where `Inputs.held_out` is; likewise certification. strangers: (s, P), states of their prompts;
    None where there are none.
    """

    model: ModelIdentity
    adapter: AdapterIdentity | None
    representation: Representation
    policy: Policy
    fitting: list[Labelled]
    held_out: list[Labelled]
    certification: list[Labelled] = field(default_factory=list)
    strangers: Tensor | None = None


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


def require_inputs_calibrated(chat: ChatFormat, inputs: Inputs, policy: Policy, tag: str) -> None:
    """Raises DataError for records to fit or certify on that the server would not call calibrated. Held-out records
    may depart from the policy; they count as not answered."""
    for file in (inputs.fitting, inputs.certification):
        if file is not None:
            require_calibrated(file.path, file.records, policy, chat, tag)


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


async def answer_inputs(
    engine: Engine, chat: ChatFormat, inputs: Inputs, policy: Policy, asking: AnsweringOptions
) -> Answers:
    """Raises CalibrationError or EngineError; the answers until then are cached."""
    fitting = await answer_file(engine, chat, inputs.fitting, policy, asking, "answering")
    held_out: list[Labelled] = []
    for file in inputs.held_out:
        held_out += await answer_file(engine, chat, file, policy, asking, "answering held-out records")
    certification: list[Labelled] = []
    if inputs.certification is not None:
        certification = await answer_file(
            engine, chat, inputs.certification, policy, asking, "answering records to certify on"
        )
    strangers = None
    if inputs.strangers is not None:
        asked = inputs.strangers.conversations
        with tqdm(total=len(asked), desc="reading strangers", unit="prompt") as bar:
            strangers = await read_strangers(engine, chat, asked, policy, asking.concurrency, bar.update)
    return Answers(
        engine.identity,
        engine.adapter,
        engine.representation,
        policy,
        fitting,
        held_out,
        certification,
        strangers,
    )


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


async def answer_sets(
    engine: Engine, chat: ChatFormat, bundle: Bundle, sets: Mapping[str, DataFile], asking: AnsweringOptions
) -> dict[str, list[Labelled]]:
    """Answers named sets by a bundle's own policy.

    engine: of the bundle's model and representation, which the caller has checked.
    Raises CalibrationError or EngineError.
    """
    return {
        name: await answer_file(engine, chat, file, bundle.manifest.policy, asking, f"answering {name}")
        for name, file in sets.items()
    }


def evaluate_sets(
    bundle: Bundle, answers: Mapping[str, Sequence[Labelled]], seed: int = 0
) -> dict[str, Evaluation]:
    """Evaluates a bundle on answers to named sets, at its own alphas."""
    return {
        name: evaluate(bundle.estimator, some, bundle.manifest.alphas, seed, bundle.rule)
        for name, some in answers.items()
    }


def require_unseen(bundle: Bundle, file: DataFile) -> None:
    """Raises DataError where the bundle was fitted on one of the file's prompts."""
    fitted = set(bundle.report["fitted_prompts"])
    problems = [
        f"{record.place}: the bundle was fitted on this prompt"
        for record in file.records
        if fitted & {record.prompt_digest, earlier_prompt_digest(record.messages)}
    ]
    if problems:
        raise DataError.from_problems(
            file.path, problems, "Evaluate on other prompts: these say nothing new."
        )


async def answer_file(
    engine: Engine,
    chat: ChatFormat,
    file: DataFile,
    policy: Policy,
    asking: AnsweringOptions,
    title: str,
    watch: Watching | None = None,
) -> list[Labelled]:
    """Answers and labels a file's records. watch: sees each answer; by default `early.Watch`."""
    questions = [one for one in file.records if isinstance(one, DecisionRecord)]
    if questions:
        with (
            AnswerCache(asking.cache) as cache,
            tqdm(total=len(questions), desc=title, unit="question") as bar,
        ):
            return await decide_records(
                engine, chat, questions, policy, cache, asking.concurrency, bar.update
            )
    number = len(file.records) * policy.resample
    seen = watch or Watch(
        number, policy.max_tokens, lambda line: tqdm.write(f"{file.path}: {line}", sys.stderr)
    )

    async def collected(cache: AnswerCache, watch: Watching) -> list[Labelled]:
        with tqdm(total=number, desc=title, unit="answer", delay=1) as bar:
            return await collect(
                engine,
                chat,
                file.records,
                policy,
                engine.representation,
                cache,
                asking.concurrency,
                bar.update,
                asking.seed,
                watch,
                asking.relabel,
                asking.prompt_states,
            )

    with AnswerCache(asking.cache) as cache:
        answers = await collected(cache, seen)
        left = [
            (record, attempt.response)
            for record, answer in zip(file.records, answers, strict=True)
            for attempt in answer.attempts
            if (attempt.unknown and asking.person) or record.id in asking.review
        ]
        if left and ask_person(left, cache):
            answers = await collected(cache, lambda *_: None)
    attempts = [attempt for answer in answers for attempt in answer.attempts]
    if unknown := sum(attempt.unknown for attempt in attempts):
        tqdm.write(
            f"{file.path}: {unknown} of {len(attempts)} answers ({unknown / len(attempts):.0%}) have no known label: "
            "left out of fitting, counted as wrong in figures and certificates. --ask-person asks you about them",
            file=sys.stderr,
        )
    for told in {one.costs() for record in file.records if (one := verifier_of(record)) and one.costs}:
        tqdm.write(f"{file.path}: {told}", file=sys.stderr)
    if faults := count_faults(attempts):
        told = ", ".join(f"{count} {fault}" for fault, count in faults.items())
        tqdm.write(
            f"{file.path}: {told} of {len(attempts)} answers cannot be scored: left out of fitting, "
            "counted as not admitted in figures",
            file=sys.stderr,
        )
    return answers
