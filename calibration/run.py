"""The whole way, step by step: files to a published bundle, and a bundle to its figures.

    read and check every file        before the engine starts
    answer and label                 cached, so a killed run goes on here
    set aside the held-out part      or take it from its own files
    fit on the rest                  J rounds
    evaluate on the held-out part    reports only
    publish                          atomic: a bundle or nothing

The engine comes from outside: the same one serves.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calibration.cache import AnswerCache
from calibration.data import Record, load_records, require_disjoint
from calibration.errors import CalibrationError, DataError
from calibration.evaluate import Evaluation, evaluate
from calibration.fit import FitSettings, fit, set_aside, standardisation_blocks
from calibration.generate import Labelled, collect, count_faults
from calibration.report import build_report
from engine.base import Engine, ModelIdentity, Representation
from engine.prompt import ChatFormat
from model_store.bundle import Bundle, Exemplar
from model_store.manifest import Manifest, Policy
from model_store.store import publish

CLASS_NAMES = ("does not follow the instruction", "follows the instruction")

HELD_OUT_SHARE = 0.2
"""Of the records, where no held-out file is given."""


@dataclass(frozen=True)
class DataFile:
    """A file of records that was read and checked. sha256: of its bytes."""

    path: Path
    records: list[Record]
    sha256: str

    @classmethod
    def load(cls, path: Path) -> DataFile:
        """Raises DataError."""
        records = load_records(path)
        return cls(path, records, hashlib.sha256(path.read_bytes()).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """Without folders, which would tell of the machine."""
        verifiers = {record.verifier.rpartition("/")[2] for record in self.records if record.verifier}
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "records": len(self.records),
            "given_responses": sum(record.response is not None for record in self.records),
            "verifiers": sorted(verifiers),
        }


@dataclass(frozen=True)
class Inputs:
    """fitting: the file to fit on. held_out: files that only report; empty: a part of `fitting` does."""

    fitting: DataFile
    held_out: tuple[DataFile, ...]

    @classmethod
    def load(cls, fitting: Path, held_out: Sequence[Path]) -> Inputs:
        """Raises DataError, also where a prompt stands both in `fitting` and in a held-out file."""
        inputs = cls(DataFile.load(fitting), tuple(map(DataFile.load, held_out)))
        for file in inputs.held_out:
            require_disjoint(fitting, inputs.fitting.records, file.path, file.records)
        return inputs


@dataclass(frozen=True)
class Asking:
    """How the engine is asked: where answers are cached, records in flight at once, seed of sampling."""

    cache: Path
    concurrency: int
    seed: int = 0


def require_free(out: Path) -> None:
    """Raises CalibrationError where no new bundle can be published, before hours of work are spent."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CalibrationError(f"{out} exists already; give another --out, or move it away first")


@dataclass(frozen=True, eq=False)
class Answers:
    """Everything that was asked of the engine, and who answered; the engine is not needed any more.

    held_out: empty where `Inputs.held_out` is.
    """

    model: ModelIdentity
    representation: Representation
    policy: Policy
    fitting: list[Labelled]
    held_out: list[Labelled]


@dataclass(frozen=True, eq=False)
class Made:
    """A published bundle. evaluation: on the held-out part; it stands in the report too."""

    digest: str
    evaluation: Evaluation
    report: dict[str, Any]


async def answer_inputs(
    engine: Engine, chat: ChatFormat, inputs: Inputs, policy: Policy, asking: Asking
) -> Answers:
    """Raises CalibrationError or EngineError; what was answered until then is cached."""
    fitting = await _answer(engine, chat, inputs.fitting, policy, asking, "answering")
    held_out: list[Labelled] = []
    for file in inputs.held_out:
        held_out += await _answer(engine, chat, file, policy, asking, "answering held-out records")
    return Answers(engine.identity, engine.representation, policy, fitting, held_out)


def make_bundle(inputs: Inputs, answers: Answers, settings: FitSettings, out: Path, name: str) -> Made:
    """Fits, evaluates, publishes. Raises CalibrationError or BundleError; then nothing stands at `out`."""
    fitting, held_out = answers.fitting, answers.held_out
    if not inputs.held_out:
        fitting, held_out = set_aside(fitting, HELD_OUT_SHARE, settings.seed)
    if not held_out:
        raise DataError("no record is left for the held-out part: add records, or give a file with --test")
    blocks = standardisation_blocks(answers.representation, answers.model.hidden_size)
    with tqdm(total=settings.rounds * settings.epochs, desc="training", unit="epoch") as bar:
        fitted = fit(fitting, blocks, settings, bar.update)
    evaluation = evaluate(fitted.estimator, held_out, settings.alphas, settings.seed)
    report = build_report(fitted, settings, fitting, held_out, evaluation)
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=answers.model,
        representation=answers.representation,
        policy=answers.policy,
        alphas=settings.alphas,
        class_names=CLASS_NAMES,
        provenance={
            "data": inputs.fitting.to_json(),
            "held_out_data": [file.to_json() for file in inputs.held_out],
            "held_out_share": None if inputs.held_out else HELD_OUT_SHARE,
            "counts": report["counts"],
            "settings": settings.to_json(),
        },
    )
    exemplars = [
        Exemplar(answer.id, answer.label, prediction, answer.prompt, answer.response)
        for answer, prediction in zip(
            fitted.training, fitted.estimator.support.predictions.tolist(), strict=True
        )
    ]
    return Made(publish(out, manifest, fitted.estimator, exemplars, report), evaluation, report)


async def run_evaluation(
    engine: Engine, chat: ChatFormat, bundle: Bundle, sets: Mapping[str, DataFile], asking: Asking
) -> dict[str, Evaluation]:
    """Figures of a bundle on named sets, at its own alphas and by its own policy.

    engine: of the bundle's model and representation, which the caller has checked.
    Raises CalibrationError or EngineError.
    """
    evaluations = {}
    for name, file in sets.items():
        answers = await _answer(engine, chat, file, bundle.manifest.policy, asking, f"answering {name}")
        evaluations[name] = evaluate(bundle.estimator, answers, bundle.manifest.alphas, asking.seed)
    return evaluations


def require_unseen(bundle: Bundle, file: DataFile) -> None:
    """Raises DataError where the bundle was fitted on one of the file's prompts."""
    fitted = set(bundle.report["fitted_prompts"])
    problems = [
        f"line {record.line}: the bundle was fitted on this prompt"
        for record in file.records
        if record.prompt_digest in fitted
    ]
    if problems:
        raise DataError.from_problems(
            file.path, problems, "Evaluate on other prompts: these say nothing new."
        )


async def _answer(
    engine: Engine, chat: ChatFormat, file: DataFile, policy: Policy, asking: Asking, title: str
) -> list[Labelled]:
    with (
        AnswerCache(asking.cache) as cache,
        tqdm(total=len(file.records), desc=title, unit="answer") as bar,
    ):
        answers = await collect(
            engine,
            chat,
            file.records,
            policy,
            engine.representation,
            cache,
            asking.concurrency,
            bar.update,
            asking.seed,
        )
    if faults := count_faults(answers):
        told = ", ".join(f"{count} {fault}" for fault, count in faults.items())
        tqdm.write(
            f"{file.path}: {told} of {len(answers)} answers cannot be scored: left out of fitting, "
            "counted as not admitted in figures",
            file=sys.stderr,
        )
    return answers
