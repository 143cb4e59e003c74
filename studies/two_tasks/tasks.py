"""The two tasks, and the answers to their prompts out of the cache: no model is run.

`python -m studies.two_tasks` fills the caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from candor.calibration.generate import Labelled
from candor.calibration.run import AnsweringOptions, DataFile, answer_file
from candor.engine.base import (
    AdapterIdentity,
    Delta,
    EngineError,
    Generation,
    HiddenSummary,
    ModelIdentity,
    PromptStates,
    Representation,
    Sampling,
)
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import load_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
SETS = ("test", "shifted", "ood")


@dataclass(frozen=True)
class Task:
    """data: folder with calibration.jsonl and a file for each of `SETS`."""

    name: str
    data: Path
    model: Path
    bundle: Path

    @property
    def answers(self) -> Path:
        return self.data / "answers"

    def file(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"


DEMO = Task(
    "word ordering", ROOT / "var/demo", ROOT / "var/models/smollm2-135m-word-ordering", ROOT / "demo/bundle"
)
ARITHMETIC = Task(
    "arithmetic",
    ROOT / "var/arithmetic",
    ROOT / "var/arithmetic/finetuned/model",
    ROOT / "var/arithmetic/bundle",
)


@dataclass
class FinishedEngine:
    """An engine that has given all its answers: what is not in the cache is an error."""

    identity: ModelIdentity
    earlier_identity: ModelIdentity
    representation: Representation
    max_model_len: int = 1024
    adapter: AdapterIdentity | None = None

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        raise EngineError("an answer is not in the cache; run `python -m studies.two_tasks` first")
        yield  # makes this a generator

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        raise EngineError("all answers are generated, none is given")

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        raise EngineError("an answer's prompt is not asked for alone")

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def answers(task: Task, name: str) -> list[Labelled]:
    """The answers to one of the task's files, labelled: h as its bundle orders it. Raises EngineError."""
    manifest = load_bundle(task.bundle).manifest
    engine = FinishedEngine(manifest.model, manifest.model, manifest.representation)
    file, chat = DataFile.load(task.file(name)), ChatFormat.from_directory(task.model)
    return asyncio.run(
        answer_file(engine, chat, file, manifest.policy, AnsweringOptions(task.answers, 1), name)
    )
