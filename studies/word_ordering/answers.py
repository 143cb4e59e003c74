"""Every row's model answers the same prompts; what the engine said is cached, so a stopped run goes on.

h is taken with the evidence at its end; the papers' h is the rest.

The papers' final layer is fitted on documents instead: each calibration prompt with its right answer or, by a
coin, a wrong one: the model's own if that is wrong, else the static negative (arXiv 2510.26183, section 4). What
of them the model did not write is summarised as a given response.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from candor.calibration.cache import AnswerCache
from candor.calibration.data import Label, Record, load_records
from candor.calibration.generate import Labelled, collect
from candor.engine.base import EVIDENCE, Representation
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.finetune.word_ordering import SYSTEM_PROMPT
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.policy import Policy

SETS = ("calibration", "test", "harvard", "shifted")
REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
POLICY = Policy(max_tokens=96, conversations=Conversations(SystemPrompt.fixed(SYSTEM_PROMPT)))
CONCURRENCY = 64


@dataclass(frozen=True)
class Answers:
    """own: the model's greedy answers by set. documents: of the calibration prompts, in order."""

    own: dict[str, list[Labelled]]
    documents: list[Labelled]


def answer(model: Path, data: Path, sets: dict[str, list[Record]], cache: Path, engine: str) -> Answers:
    return asyncio.run(_answer(model, data, sets, cache, engine))


def sets_of(data: Path, of_each: int | None = None) -> dict[str, list[Record]]:
    """Harvard's sentences are a set where they were given. of_each: only so many of each set."""
    files = {name: data / f"{name}.jsonl" for name in SETS}
    return {name: load_records(file)[:of_each] for name, file in files.items() if file.exists()}


async def _answer(model: Path, data: Path, sets: dict[str, list[Record]], cache: Path, kind: Any) -> Answers:
    chat = ChatFormat.from_directory(model)
    settings = EngineSettings(
        model=model, kind=kind, representation=REPRESENTATION, max_model_len=512, eager=True
    )
    engine = await start_engine(settings, chat)
    try:
        with AnswerCache(cache) as answers:

            async def ask(name: str, records: list[Record]) -> list[Labelled]:
                with tqdm(total=len(records), desc=f"{model.parent.name}: {name}", unit="answer") as bar:
                    return await collect(
                        engine, chat, records, POLICY, REPRESENTATION, answers, CONCURRENCY, bar.update
                    )

            own = {name: await ask(name, records) for name, records in sets.items()}
            documents = _documents(data, own["calibration"])
            given = iter(await ask("documents", [d for d in documents if isinstance(d, Record)]))
        return Answers(own, [next(given) if isinstance(d, Record) else d for d in documents])
    finally:
        await engine.close()


def _documents(data: Path, own: list[Labelled]) -> list[Record | Labelled]:
    """Per calibration prompt a response to be summarised, or the model's own wrong answer."""
    rng = random.Random(0)
    shown: list[Record | Labelled] = []
    lines = (data / "calibration-pairs.jsonl").read_text(encoding="utf-8").splitlines()
    # strict=False: a row may have been asked only the first of them.
    for number, (line, generated) in enumerate(zip(lines, own, strict=False), start=1):
        made = json.loads(line)
        label: Label = 0
        if rng.random() < 0.5:
            response, label = made["positive"], 1
        elif generated.label == 0 and generated.fault is None:
            shown.append(generated)
            continue
        else:
            response = made["negative"]
        messages = tuple(made["messages"])
        shown.append(Record(made["id"], messages, number, response=response, label=label))
    return shown
