"""What an engine is started with."""

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

    dtype: what the weights are served in; part of the model's identity, since states differ with it.
    max_model_len: longest sequence in tokens: prompt, answer and tag.
    kv_cache_bytes: memory for the KV cache; None leaves it to vLLM, on CPUs 1 GiB.
    block_size: tokens per KV block; smaller blocks let more of a shared prefix be reused. None leaves it to vLLM,
        which drops the attention backends that cannot do what it is told; on CPUs it is 32.
    max_num_batched_tokens: tokens computed per step; longer prompts are computed in chunks of it.
    eager: no compilation: starts sooner, runs slower.
    asynchronous: vLLM plans a step while the one before is computed.
    served_model_name: what the engine's own metrics call the model; without it, its directory.
    vllm: more of vLLM's options by its own names (engine/vllm_options.py); they go before what is set here.
    adapters: directories of LoRA adapters that can be laid over the model (`VLLMEngine.with_adapter`).
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
