"""The demo's answers as calibration sees them, out of the cache that making the demo filled: no model is run.

python -m benchmarks.demo_accuracy        fills the cache of the held-out sets, demo/README.md's commands the rest
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.cache import AnswerCache
from calibration.data import load_records
from calibration.generate import Labelled, collect
from engine.base import (
    AdapterIdentity,
    Delta,
    EngineError,
    Generation,
    HiddenSummary,
    ModelIdentity,
    Representation,
    Sampling,
)
from engine.prompt import ChatFormat
from model_store.bundle import load_bundle

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "var/models/smollm2-135m-word-ordering"
DATA = ROOT / "var/demo"


@dataclass
class FinishedEngine:
    """An engine that has given all its answers: what is not in the cache is an error."""

    identity: ModelIdentity
    representation: Representation
    max_model_len: int = 1024
    adapter: AdapterIdentity | None = None

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, capture: bool = True
    ) -> AsyncGenerator[Delta | Generation, None]:
        raise EngineError("an answer is not in var/demo/answers; make the demo first, see demo/README.md")
        yield  # makes this a generator

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        raise EngineError("the demo's answers are generated, none is given")

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def load(name: str) -> list[Labelled]:
    """The answers to var/demo/<name>.jsonl, labelled: h as the demo's bundle orders it. Raises EngineError."""
    manifest = load_bundle(ROOT / "demo/bundle").manifest
    engine = FinishedEngine(manifest.model, manifest.representation)
    records, chat = load_records(DATA / f"{name}.jsonl"), ChatFormat.from_directory(MODEL)
    with AnswerCache(DATA / "answers") as cache:
        return asyncio.run(
            collect(
                engine, chat, records, manifest.policy, manifest.representation, cache, 1, lambda done: None
            )
        )
