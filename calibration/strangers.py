"""Declared strangers: prompts that must be refused although they look like the task, such as a changed instruction.

Half of them teach the probe (`sdm.probe`). The other half only shows how many still pass, with the probe and without.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candor.calibration.data import parse_lines, prompt_digest, read_messages
from candor.calibration.errors import CalibrationError, DataError
from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Turn
from candor.policy.policy import Policy

REMEDY = 'Give one JSON object a line, with "messages"; other fields are ignored.'
FEWEST = 20
"""Half of them must be told apart in five folds."""


@dataclass(frozen=True)
class Strangers:
    """A file of conversations that are to be refused, each once. sha256: of its bytes."""

    path: Path
    conversations: tuple[tuple[Turn, ...], ...]
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


def load_strangers(path: Path, calibrated: Sequence[str]) -> Strangers:
    """Conversations of a JSON Lines file. calibrated: digests of the prompts to calibrate on.

    Raises DataError that lists the offending lines, also where a prompt is both strange and calibrated on, or there
    are too few.
    """
    found = parse_lines(path, lambda fields, _: read_messages(fields.get("messages")), REMEDY)
    known = set(calibrated)
    problems = [
        f"conversation {number}: it is also a record to calibrate on"
        for number, turns in enumerate(found, start=1)
        if prompt_digest(turns) in known
    ]
    if problems:
        raise DataError.from_problems(path, problems, "A prompt is either of the task or a stranger to it.")
    once = {prompt_digest(turns): turns for turns in found}
    if len(once) < FEWEST:
        raise DataError(
            f"{path}: expected at least {FEWEST} different strangers, got {len(once)}; declare more"
        )
    return Strangers(path, tuple(once.values()), hashlib.sha256(path.read_bytes()).hexdigest())


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


def halves(strangers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(those to fit on, those kept apart), at random."""
    order = torch.randperm(len(strangers), generator=torch.Generator().manual_seed(seed))
    middle = (len(strangers) + 1) // 2
    return strangers[order[:middle]], strangers[order[middle:]]
