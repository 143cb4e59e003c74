"""Loads the language model for training: LoRA adapters or all parameters, with optional compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from candor.finetune.settings import FinetuneSettings

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_model(directory: Path, settings: FinetuneSettings, depth: float = 1.0) -> Any:
    """Loads a transformers model, wrapped by peft if `lora_rank` is above 0. depth: share of the layers, from the
    last, that the adapter changes.

    Frozen weights are bfloat16 (float32 without `bf16`); trained ones are always float32.
    """
    from transformers import AutoModelForCausalLM

    frozen = torch.bfloat16 if settings.bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=frozen if settings.lora_rank else torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        # On CPUs, the fused attention's backward pass alone took a third of a step at these lengths.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
    )
    base.generation_config.update(temperature=None, top_p=None, top_k=None)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        _compile_layers(base, bool(settings.lora_rank))
    model = _with_adapters(base, settings, depth) if settings.lora_rank else base
    return model.train()  # all modules: a compiled layer that changes its mode is recompiled


def _with_adapters(base: Any, settings: FinetuneSettings, depth: float) -> Any:
    import peft

    # The seed makes every process and every resumed run begin with the same adapters.
    torch.manual_seed(settings.seed)
    layers = base.config.get_text_config().num_hidden_layers
    adapted = list(range(layers - max(1, round(depth * layers)), layers))
    return peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=TARGETS,
            layers_to_transform=adapted if depth < 1 else None,
            task_type="CAUSAL_LM",
        ),
    )


def _compile_layers(base: Any, lora: bool) -> None:
    """Compiles layer by layer: all layers share one compilation, which takes seconds instead of minutes."""
    torch._dynamo.config.specialize_float = True  # the adapters' scale is a constant
    for layer in base.get_decoder().layers:
        layer.compile(dynamic=True)
    if lora:  # otherwise the first layer's input needs no gradient, unlike the others'
        base.enable_input_require_grads()
