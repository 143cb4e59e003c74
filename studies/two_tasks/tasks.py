"""The two tasks, and the answers to their prompts out of the cache: no model is run.

`python -m studies.two_tasks` fills the caches.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.calibration.answering import AnsweringOptions, DataFile, answer_file
from candor.calibration.generate import Labelled
from candor.calibration.kept import KeptAnswers
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.model_store.bundle import load_bundle
from candor.model_store.manifest import Manifest

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


def finished(model: Path, manifest: Manifest, chat: ChatFormat) -> KeptAnswers:
    """Stands in for the engine, which has given all its answers to this bundle's policy."""
    dtype: Any = manifest.model.dtype
    return KeptAnswers(EngineSettings(model, "vllm", manifest.representation, dtype, 1024), chat)


def answers(task: Task, name: str) -> list[Labelled]:
    """The answers to one of the task's files, labelled: h as its bundle orders it. Raises NotKept."""
    manifest = load_bundle(task.bundle).manifest
    file, chat = DataFile.load(task.file(name)), ChatFormat.from_directory(task.model)
    engine = finished(task.model, manifest, chat)
    return asyncio.run(
        answer_file(engine, chat, file, manifest.policy, AnsweringOptions(task.answers, 1), name)
    )
