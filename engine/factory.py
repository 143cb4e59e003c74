"""How to start an engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from engine.base import Engine, Representation
from engine.prompt import ChatFormat


@dataclass(frozen=True)
class EngineSettings:
    """model: directory with config.json, safetensors and tokenizer.

    dtype: what the weights are served in; part of the model's identity, since states differ with it.
    max_model_len: longest sequence in tokens: prompt, answer and tag.
    kv_cache_bytes: memory for the KV cache; None leaves it to vLLM, on CPUs 1 GiB.
    block_size: tokens per KV block; smaller blocks let more of a shared prefix be reused.
    max_num_batched_tokens: tokens computed per step; longer prompts are computed in chunks of it.
    eager: no compilation: starts sooner, runs slower.
    asynchronous: vLLM plans a step while the one before is computed.
    served_model_name: what the engine's own metrics call the model; without it, its directory.
    adapters: directories of LoRA adapters that can be laid over the model (`VLLMEngine.under`).
    """

    model: Path
    kind: Literal["vllm", "transformers"] = "vllm"
    representation: Representation = field(default_factory=Representation)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int | None = None
    block_size: int = 32
    eager: bool = False
    asynchronous: bool = True
    served_model_name: str | None = None
    adapters: tuple[Path, ...] = ()


async def start_engine(settings: EngineSettings, chat: ChatFormat | None = None) -> Engine:
    """Starts the engine that `settings.kind` names; returns when it can answer.

    Raises EngineError where model or machine do not allow it.
    """
    chat = chat or ChatFormat.from_directory(settings.model)
    if settings.kind == "vllm":
        from engine.vllm_engine import VLLMEngine

        return VLLMEngine(settings, chat)
    from engine.transformers_engine import TransformersEngine

    return TransformersEngine(settings, chat)


async def start_under(adapter: Path | None, settings: EngineSettings, chat: ChatFormat) -> Engine:
    """The same with one adapter laid over the model, or none."""
    if adapter is None:
        return await start_engine(settings, chat)
    engine: Any = await start_engine(replace(settings, adapters=(adapter,)), chat)  # vLLM's: others refuse it
    return cast(Engine, engine.under(adapter, settings.representation))
