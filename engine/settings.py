"""Settings of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from candor.engine.base import Representation

EngineKind = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class EngineSettings:
    """model: directory with config.json, safetensors and tokenizer.

    dtype: dtype of the served weights; part of the model's identity, since the states depend on it.
    max_model_len: maximum sequence length in tokens: prompt, answer and tag.
    kv_cache_bytes: memory for the KV cache; None leaves it to vLLM, or is 1 GiB on CPUs.
    block_size: tokens per KV block; smaller blocks let more of a shared prefix be reused. None leaves it to vLLM
        (a given size excludes attention backends that do not support it), or is 32 on CPUs.
    max_num_batched_tokens: tokens computed per step; longer prompts are computed in chunks of this size.
    eager: disables compilation: the engine starts sooner and runs slower.
    asynchronous: vLLM plans a step while it computes the one before, where it can (not in its CPU build).
    served_model_name: the model's name in the engine's own metrics; default: its directory.
    vllm: further vLLM options under vLLM's names (engine/vllm_options.py); they override the settings here.
    adapters: directories of LoRA adapters that can be served on the model (`VLLMEngine.with_adapter`).
    """

    model: Path
    kind: EngineKind = "vllm"
    representation: Representation = field(default_factory=Representation)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int | None = None
    block_size: int | None = None
    eager: bool = False
    asynchronous: bool = True
    served_model_name: str | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[Path, ...] = ()
