"""A scripted engine and chat format, for speed: what is tested here is what calibration does with answers.

The engine's own suite runs the real ones. Prompts of the scripted task are "number <i>"; the right answer
is "<i>". Prompt i is hard by u_i in [0, 1), a fixed hash, and answered wrongly when u_i > 0.7. The states
show u_i, and in one entry whether the answer is right; the other half of h is noise from the same hash.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.engine.base import (
    AdapterIdentity,
    Delta,
    Generation,
    HiddenSummary,
    ModelIdentity,
    PromptReading,
    PromptStates,
    Representation,
    Sampling,
)
from candor.engine.prompt import ChatFormat

HIDDEN = 4


class ScriptedTokenizer:
    """One id a character; the template is "<role>content" for each message, then "<assistant>"."""

    chat_template = "scripted"
    eos_token_id = 0

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if any(message["role"] == "assistant" for message in messages):
            raise ValueError("this template knows no earlier answers")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def hardness(i: int) -> float:
    return int.from_bytes(sha256(str(i).encode()).digest()[:4], "big") / 2**32


class ScriptedEngine:
    """Answers the scripted task after `delay` seconds.

    asked: prompt and sampling of every call, in order. log: each finished prompt is appended to it.
    read: how many prompts' states were asked for alone.
    overrides: by prompt number, fields of the Generation to replace.
    """

    identity = ModelIdentity("scripted", "Scripted", HIDDEN, "float32", "k", "w", "t", "c")

    def __init__(self, delay: float = 0.0, log: Path | None = None) -> None:
        self.representation = Representation()
        self.adapter: AdapterIdentity | None = None
        self.max_model_len = 200
        self.asked: list[tuple[str, Sampling | None]] = []
        self.read = 0
        self.overrides: dict[int, dict[str, Any]] = {}
        self.running = self.most_running = 0
        self.closed = False
        self._delay = delay
        self._log = log

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncIterator[PromptStates | Delta | Generation]:
        prompt = "".join(map(chr, prompt_ids))
        self.asked.append((prompt, sampling))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await asyncio.sleep(self._delay)
            i = _number(prompt)
            text = str(i) if hardness(i) <= 0.7 else f"{i}?"
            states = _prompt_states(i) if prompt_states else None
            if states is not None:
                yield states
            yield Delta(text)
            fields: dict[str, Any] = {
                "text": text,
                "token_ids": (),
                "finish_reason": "stop",
                "tagged": True,
                "truncated": False,
                "hidden": _summary(i),
                "prompt_tokens": len(prompt_ids),
                "completion_tokens": len(text),
                "prompt": states,
            }
            override = self.overrides.get(i, {})
            if "raises" in override:
                raise override["raises"]
            yield Generation(**(fields | override))
            if self._log is not None:
                with self._log.open("a") as log:
                    log.write(f"{i}\n")
        finally:
            self.running -= 1

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        self.asked.append(("".join(map(chr, [*prompt_ids, *response_ids])), None))
        return _summary(_number("".join(map(chr, prompt_ids))))

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        self.read += 1
        return _prompt_states(_number("".join(map(chr, prompt_ids))))

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        """Prompts are "number <i>" and a question, whose right option is the first where i is even."""
        prompt = "".join(map(chr, prompt_ids))
        self.asked.append((prompt, None))
        i = int(prompt.split("number ")[1].split("\n")[0])
        said = (i + (hardness(i) > 0.7)) % 2
        summary = _summary(i)
        states = PromptStates(summary.mean, summary.last, complete=True)
        return PromptReading(states, tuple(-0.5 if at == said else -2.0 for at in range(len(token_ids))))

    async def check(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


def _number(prompt: str) -> int:
    return int(prompt.split("number ")[1].removesuffix("<assistant>"))


def _summary(i: int) -> HiddenSummary:
    u = hardness(i)
    mean = torch.tensor([u, -u, 0.5, 2.0 * (u <= 0.7)], dtype=torch.float32)
    last = torch.tensor([hardness(-k - 10 * i - 1) for k in range(HIDDEN)], dtype=torch.float32)
    return HiddenSummary(mean, last, torch.empty(0), positions=10, complete=True)


def _prompt_states(i: int) -> PromptStates:
    drawn = torch.randn(2 * HIDDEN, generator=torch.Generator().manual_seed(i))
    return PromptStates(drawn[:HIDDEN], drawn[HIDDEN:], complete=True)


def scripted_chat() -> ChatFormat:
    return ChatFormat(ScriptedTokenizer())


def write_task(path: Path, numbers: Sequence[int]) -> Path:
    """A data file of the scripted task."""
    with path.open("w") as file:
        for i in numbers:
            record = {
                "id": f"r{i}",
                "messages": [{"role": "user", "content": f"number {i}"}],
                "reference": str(i),
                "verifier": "exact",
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture
def make_engine() -> Callable[..., ScriptedEngine]:
    return ScriptedEngine


@pytest.fixture
def chat() -> ChatFormat:
    return scripted_chat()


@pytest.fixture
def task() -> Callable[[Path, Sequence[int]], Path]:
    return write_task


@pytest.fixture
def hard() -> Callable[[int], float]:
    return hardness
