"""Compares one engine with another in every way that an answer can be produced, on any model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

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
    """engine: the one under test. reference: computes h from its definition.

    noisy: both compute in bfloat16, where logarithms of probabilities and the tokens written differ by chance: states
    alone are compared, and no answer's own tag.
    """

    def __init__(self, engine: Engine, reference: Engine, chat: ChatFormat, *, noisy: bool = False) -> None:
        self._engine, self._chat = engine, chat
        self._reference: Any = reference
        self._parts = ("mean", "last") if noisy else ("mean", "last", "evidence")
        self._noisy = noisy

    async def hold(self) -> list[Deviation]:
        """One deviation each: fresh, cut, from the cache, in chunks, sixteen at once, given, tagged by itself."""
        short, long = self._ask(SEA), self._ask(SEA * 14)
        found = [
            await self.fresh(),
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
            found.append(self._deviation(way, *pair))
        return [*found, *[await self._tagged(tokens) for tokens in (1, 2, 3) if not self._noisy]]

    async def fresh(self) -> Deviation:
        """One answer alone."""
        return await self._answers("fresh", [(self._ask(SEA), Sampling(max_tokens=24))])

    async def hold_to_itself(self) -> list[Deviation]:
        """Compares h with what the engine itself computed, whether or not another computes the same.

        Its states have to give the log-probabilities that it reports for the next token (the reference lends the LM
        head), and the mean has to be that of the last states of every beginning of the sequence.
        """
        prompt, response = self._ask("Tell me of the sea."), self._chat.encode_response("It is wide.")
        closing, _ = self._chat.closing(self._engine.representation.tag)
        ids = [*prompt, *response, *closing]
        found = []
        for where, sequence in (("prompt", prompt), ("answer", ids)):
            answer = await self._next(sequence)
            if not answer.logprobs:  # an answer that ends at once reports none
                answer = await self._next(sequence[:-1])
            assert answer.prompt is not None
            top = answer.logprobs[0].top if answer.logprobs else ()
            logprobs = torch.log_softmax(self._logits(answer.prompt.last), dim=-1)
            reported = torch.tensor([logprob for _, _, logprob in top])
            error = _error(logprobs[[token for token, _, _ in top]], reported) if top else float("inf")
            found.append(Deviation(error, f"{where}: its logits"))
        states = [self._engine.prompt_states(ids[:end]) for end in range(1, len(ids) + 1)]
        lasts = torch.stack([one.last for one in await asyncio.gather(*states)])
        summary = await self._engine.summarise(prompt, response)
        return [
            *found,
            Deviation(_error(summary.mean, lasts.mean(0)), "answer: its mean"),
            Deviation(_error(summary.last, lasts[-1]), "answer: its last"),
        ]

    async def _next(self, prompt: list[int]) -> Generation:
        """The most probable next token, with the 20 most probable and the prompt's states."""
        sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=20)
        *_, answer = [item async for item in self._engine.generate(prompt, sampling, prompt_states=True)]
        assert isinstance(answer, Generation)
        return answer

    @torch.inference_mode()
    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        """(V,) float32: what the model makes of a final normed state, with all that follows its LM head."""
        model = self._reference._model
        head = model.get_output_embeddings()
        put = head.register_forward_pre_hook(lambda *_: state[None, None].to(head.weight.dtype))
        try:
            logits: torch.Tensor = model(torch.tensor([[1]])).logits[0, -1].float()
        finally:
            put.remove()
        return logits

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
        return self._deviation(way, have.hidden, want.hidden)

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
            want = await self._reference.summarise(prompt, answer.token_ids)
            found.append(self._deviation(way, answer.hidden, want))
        return max(found, key=lambda one: one.error)

    def _deviation(self, way: str, have: HiddenSummary, want: HiddenSummary) -> Deviation:
        if not have.complete or have.positions != want.positions:
            return Deviation(float("inf"), f"{way}: counted {have.positions} positions, {have.complete=}")
        errors = [
            Deviation(_error(getattr(have, part), getattr(want, part)), f"{way}: {part}")
            for part in self._parts
        ]
        return max(errors, key=lambda one: one.error)

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


def _error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).norm() / want.norm().clamp_min(1e-12))
