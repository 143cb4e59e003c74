"""Answers without an engine, where every one of them is kept.

Starting an engine takes a minute or two, and needs a machine that can. What it would be asked is known before: its
identity comes from the model's files. So a run first goes through the cache alone, and an engine starts at the first
answer that is not there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from candor.engine.base import (
    Delta,
    Engine,
    EngineError,
    Generation,
    HiddenSummary,
    PromptReading,
    PromptStates,
    Sampling,
)
from candor.engine.factory import start_with_adapter
from candor.engine.identity import as_before, identify, identify_adapter
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.engine.vllm_options import changing_h

T = TypeVar("T")


class NotKept(EngineError):
    """An answer is not in the cache."""


class KeptAnswers:
    """Stands in for the engine of these settings; it knows no answer (`engine.base.Engine`)."""

    def __init__(self, settings: EngineSettings, chat: ChatFormat, adapter: Path | None = None) -> None:
        """Raises EngineError if there is no such model or adapter."""
        options = changing_h(settings.vllm)
        self.identity = identify(settings.model, chat, settings.dtype, settings.max_model_len, options)
        self.earlier_identity = as_before(self.identity, settings.model)
        self.adapter = identify_adapter(adapter) if adapter is not None else None
        self.representation = settings.representation
        self.max_model_len = settings.max_model_len

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        raise NotKept("this answer is not in the cache")
        yield  # a generator, as the engines' is

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        raise NotKept("this answer is not in the cache")

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        raise NotKept("these states are not in the cache")

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        raise NotKept("this reading is not in the cache")

    async def check(self) -> None: ...

    async def close(self) -> None: ...


def whole_answers(settings: EngineSettings) -> EngineSettings:
    """Has vLLM send each answer's first token, which brings its prompt's states, and its end: nobody reads the rest
    before it is there, and a message for each token of each answer takes time that the model could have."""
    if settings.kind != "vllm":
        return settings
    return replace(settings, vllm={"stream_interval": settings.max_model_len} | dict(settings.vllm))


async def asked(
    settings: EngineSettings,
    chat: ChatFormat,
    adapter: Path | None,
    ask: Callable[[Engine], Awaitable[T]],
    check: Callable[[Engine], object] = lambda _: None,
) -> T:
    """Returns what `ask` makes of the cache alone, or else of the engine, which is closed afterwards.

    check: raises for an engine that is the wrong one; it sees its identity before the engine starts.
    """
    kept = KeptAnswers(settings, chat, adapter)
    check(kept)
    try:
        return await ask(kept)
    except NotKept:
        pass
    engine = await start_with_adapter(adapter, whole_answers(settings), chat)
    try:
        check(engine)
        return await ask(engine)
    finally:
        await engine.close()
