"""Data files, read and checked, and their answers: what calibration fits, certifies and evaluates on.

The caller passes the engine; the same engine serves. Answers are cached, so that a run that was killed goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from candor.calibration.cache import AnswerCache
from candor.calibration.data import Loaded, Record, earlier_prompt_digest, load, require_disjoint
from candor.calibration.decisions import DecisionRecord, decide_records, load_decisions
from candor.calibration.early import Watch
from candor.calibration.errors import DataError
from candor.calibration.generate import Labelled, collect, count_faults, require_calibrated
from candor.calibration.generate import Watch as Watching
from candor.calibration.labels import ask_person, verifier_of
from candor.calibration.shapes import Reading
from candor.calibration.strangers import Strangers, load_strangers, read_strangers
from candor.calibration.verifiers import without_folders
from candor.engine.base import AdapterIdentity, Engine, ModelIdentity, Representation
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle
from candor.policy.policy import Policy


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


def require_inputs_calibrated(chat: ChatFormat, inputs: Inputs, policy: Policy, tag: str) -> None:
    """Raises DataError for records to fit or certify on that the server would not call calibrated. Held-out records
    may depart from the policy; they count as not answered."""
    for file in (inputs.fitting, inputs.certification):
        if file is not None:
            require_calibrated(file.path, file.records, policy, chat, tag)


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
