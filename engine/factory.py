"""Starts an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings


async def start_engine(settings: EngineSettings, chat: ChatFormat | None = None) -> Engine:
    """Starts the engine that `settings.kind` names; returns when it is ready.

    Raises EngineError if the model or the machine does not allow it.
    """
    chat = chat or ChatFormat.from_directory(settings.model)
    if settings.kind == "vllm":
        from candor.engine.vllm_engine import VLLMEngine

        return VLLMEngine(settings, chat)
    from candor.engine.transformers_engine import TransformersEngine

    return TransformersEngine(settings, chat)


async def start_with_adapter(adapter: Path | None, settings: EngineSettings, chat: ChatFormat) -> Engine:
    """Starts the engine with one adapter, or none."""
    if adapter is None:
        return await start_engine(settings, chat)
    engine: Any = await start_engine(replace(settings, adapters=(adapter,)), chat)  # vLLM's: others refuse it
    return cast(Engine, engine.with_adapter(adapter, settings.representation))
