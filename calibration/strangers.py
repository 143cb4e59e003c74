"""Declared strangers: prompts that must be refused although they look like the task, such as a changed instruction.

Some teach the probe (`sdm.probe`); the others only show how many still pass, with the probe and without.

    "of": a record's id    it teaches if that record is in the layer's training half. So nothing that certifies, or
                           that the gates are measured against, has a twin among what fitted them
    no "of"                half of these teach, at random
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candor.calibration.data import Record, parse_lines, prompt_digest, read_messages
from candor.calibration.errors import CalibrationError, DataError
from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Turn
from candor.policy.policy import Policy

REMEDY = (
    'Give one JSON object a line, with "messages" and, if it was made of a record of the data, "of": its id.'
)
FEWEST = 20
"""Half of them must be told apart in five folds."""


@dataclass(frozen=True)
class Strangers:
    """A file of conversations that are to be refused, each once. of: digest of the prompt that each was made of; None
    if it is of its own. sha256: of the file's bytes."""

    path: Path
    conversations: tuple[tuple[Turn, ...], ...]
    of: tuple[str | None, ...]
    sha256: str

    @property
    def digests(self) -> list[str]:
        return [prompt_digest(turns) for turns in self.conversations]

    def to_json(self) -> dict[str, Any]:
        """JSON without folders, which would reveal the machine."""
        return {"file": self.path.name, "sha256": self.sha256, "conversations": len(self.conversations)}


@dataclass(frozen=True)
class Passing:
    """Of `kept_apart` declared strangers, `gate_alone` would pass a gate without a probe, and `both` pass this rule.
    fitted: those that taught the probe."""

    fitted: int
    kept_apart: int
    gate_alone: int
    both: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"of {self.kept_apart} declared strangers kept apart {self.both} pass, {self.gate_alone} without the "
            f"{self.fitted} that were learnt from"
        )


def load_strangers(path: Path, records: Sequence[Record]) -> Strangers:
    """Conversations of a JSON Lines file. records: all that are calibrated, certified or reported on.

    Raises DataError that lists the offending lines, also where a prompt is both strange and such a record's, where
    there is no record that one is said to be of, or there are too few.
    """

    def read(fields: dict[str, Any], _: int) -> tuple[tuple[Turn, ...], str | None]:
        if not isinstance(of := fields.get("of"), str | None):
            raise ValueError('"of" must be the id of a record')
        return read_messages(fields.get("messages")), of

    found = parse_lines(path, read, REMEDY)
    known, by_id = (
        {record.prompt_digest for record in records},
        {record.id: record.prompt_digest for record in records},
    )
    problems = []
    for number, (turns, of) in enumerate(found, start=1):
        if prompt_digest(turns) in known:
            problems.append(f"conversation {number}: it is also a record to calibrate on")
        if of is not None and of not in by_id:
            problems.append(f'conversation {number}: there is no record "{of}"')
    if problems:
        raise DataError.from_problems(path, problems, "A prompt is either of the task or a stranger to it.")
    once = {prompt_digest(turns): (turns, None if of is None else by_id[of]) for turns, of in found}
    if len(once) < FEWEST:
        raise DataError(
            f"{path}: expected at least {FEWEST} different strangers, got {len(once)}; declare more"
        )
    conversations, of_digests = zip(*once.values(), strict=True)
    return Strangers(path, conversations, of_digests, hashlib.sha256(path.read_bytes()).hexdigest())


async def read_strangers(
    engine: Engine,
    chat: ChatFormat,
    conversations: Sequence[Sequence[Turn]],
    policy: Policy,
    concurrency: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """States (s, P) of the conversations' prompts at the end of prefill.

    Raises CalibrationError for one that the engine cannot take, or could not read whole.
    """
    room = asyncio.Semaphore(concurrency)

    async def read(number: int, turns: Sequence[Turn]) -> Tensor:
        async with room:
            try:
                states = await engine.prompt_states(policy.conversations.resolve(turns).encode(chat))
            except ValueError as error:
                raise CalibrationError(f"stranger {number}: {error}") from error
        if not states.complete:
            raise CalibrationError(f"stranger {number}: not every position was counted; run again")
        progress(1)
        return states.vector().float()

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(read(number, turns)) for number, turns in enumerate(conversations, start=1)
        ]
    return torch.stack([task.result() for task in tasks])


def dealt(
    strangers: Tensor, of: Sequence[str | None], training: Collection[str], seed: int
) -> tuple[Tensor, Tensor]:
    """(those to fit on, those kept apart). strangers (s, P); of: `Strangers.of`.

    training: digests of the prompts of the training half.
    """
    coin = torch.rand(len(strangers), generator=torch.Generator().manual_seed(seed)) < 0.5
    teaches = torch.tensor(
        [bool(coin[row]) if one is None else one in training for row, one in enumerate(of)]
    )
    return strangers[teaches], strangers[~teaches]
