"""Compares one engine with another in every way that an answer can be produced, on any model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from candor.engine.base import (
    EVIDENCE,
    Engine,
    Generation,
    HiddenSummary,
    Representation,
    Sampling,
)
from candor.engine.prompt import SEPARATOR, ChatFormat

REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
CHUNK = 64
"""Tokens per step of the engine under test; some prompts here take several steps."""
TRIED = 30
"""Prompts whose answers may give a tag: random models repeat themselves, and what was written before is none."""
SEA = "The old man walked slowly by the sea, and the boats lay in the harbor. "


@dataclass(frozen=True)
class Deviation:
    """The largest relative error of any part of h, and where it occurred."""

    error: float
    where: str


class Contract:
    """engine: the one under test. reference: computes h from its definition."""

    def __init__(self, engine: Engine, reference: Engine, chat: ChatFormat) -> None:
        self._engine, self._reference, self._chat = engine, reference, chat

    async def hold(self) -> list[Deviation]:
        """One deviation each: fresh, cut, from the cache, in chunks, sixteen at once, given, tagged by itself."""
        short, long = self._ask(SEA), self._ask(SEA * 14)
        found = [
            await self._answers("fresh", [(short, Sampling(max_tokens=24))]),
            await self._answers("cut", [(short, Sampling(max_tokens=3))]),
            await self._answers("cached", [(short, Sampling(max_tokens=24))]),
            await self._answers("chunks", [(long, Sampling(max_tokens=12, temperature=0.9, seed=3))]),
            await self._answers("chunks, cached", [(long, Sampling(max_tokens=12, temperature=0.9, seed=4))]),
            await self._answers("mixed", self._mixed()),
            await self._answers("mixed, cached", self._mixed()),
        ]
        response = self._chat.encode_response(SEA * 8)
        for way in ("given", "given, cached"):
            pair = [await engine.summarise(short, response) for engine in (self._engine, self._reference)]
            found.append(_deviation(way, *pair))
        return [*found, *[await self._tagged(tokens) for tokens in (1, 2, 3)]]

    async def _tagged(self, tokens: int) -> Deviation:
        """An answer that ends with its tag by itself; the tag is made of text that the model writes anyway."""
        way, greedy = f"tag of {tokens}", Sampling(max_tokens=40)
        words = SEA.split()
        for number in range(TRIED):
            prompt = self._ask(" ".join(words[number % len(words) :] + words[: number // 2]))
            written = (await _finish(self._reference, prompt, greedy)).token_ids
            if found := self._tag_in(written, tokens):
                break
        else:
            return Deviation(0.0, f"{way}: none found")
        tag, text = found
        closing = [*self._chat.encode_continuation(SEPARATOR), *tag]
        engines: tuple[Any, ...] = (self._engine, self._reference)
        answers = []
        for engine in engines:
            state = vars(engine).copy()
            engine.representation = replace(REPRESENTATION, tag=text)
            engine._tag_ids, engine._closing_ids = list(tag), closing
            answers.append(await _finish(engine, prompt, greedy))
            vars(engine).update(state)
        have, want = answers
        if have.hidden is None or want.hidden is None or not have.tagged or have.token_ids != want.token_ids:
            return Deviation(float("inf"), f"{way}: {have.token_ids} for {want.token_ids}")
        return _deviation(way, have.hidden, want.hidden)

    def _tag_in(self, written: Sequence[int], tokens: int) -> tuple[list[int], str] | None:
        for at in range(1, len(written) - tokens):
            tag = list(written[at : at + tokens])
            text = self._chat.decode(tag)
            before, whole = (self._chat.decode(written[:end]) for end in (at + tokens - 1, at + tokens))
            # Random models write bytes that are not valid text; what follows them is shown late or never.
            clean = text.isprintable() and text.strip() == text != "" and "\ufffd" not in whole
            if clean and text not in before and whole.endswith(text):
                return tag, text
        return None

    async def _answers(self, way: str, jobs: Sequence[tuple[list[int], Sampling]]) -> Deviation:
        answers = await asyncio.gather(*(_finish(self._engine, *job) for job in jobs))
        found = []
        for (prompt, _), answer in zip(jobs, answers, strict=True):
            if answer.hidden is None:
                return Deviation(float("inf"), f"{way}: no hidden state")
            found.append(
                _deviation(way, answer.hidden, await self._reference.summarise(prompt, answer.token_ids))
            )
        return max(found, key=lambda one: one.error)

    def _mixed(self) -> list[tuple[list[int], Sampling]]:
        return [
            (
                self._ask(f"Tell me of {i} boats and the wind. " * (1 + i % 5)),
                Sampling(max_tokens=6 + i, temperature=0.9 if i % 3 else 0.0, seed=i),
            )
            for i in range(16)
        ]

    def _ask(self, text: str) -> list[int]:
        return self._chat.encode_chat([{"role": "user", "content": text}])


async def _finish(engine: Engine, prompt: list[int], sampling: Sampling) -> Generation:
    *_, answer = [item async for item in engine.generate(prompt, sampling)]
    assert isinstance(answer, Generation)
    return answer


def _deviation(way: str, have: HiddenSummary, want: HiddenSummary) -> Deviation:
    if not have.complete or have.positions != want.positions:
        return Deviation(float("inf"), f"{way}: counted {have.positions} positions, {have.complete=}")
    errors = []
    for part in ("mean", "last", "evidence"):
        a, b = getattr(have, part), getattr(want, part)
        errors.append(Deviation(float((a - b).norm() / b.norm().clamp_min(1e-12)), f"{way}: {part}"))
    return max(errors, key=lambda one: one.error)
