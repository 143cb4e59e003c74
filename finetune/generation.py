"""Generates answers of the model in training, in batches: for hard negatives and for sampled uncertainty.

It uses transformers' own generation, with prompts padded on the left. An answer is cut as in the server: at its
verification tag, without outer white space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from candor.engine.prompt import ChatFormat

BATCH = 64
"""Sequences generated together."""


SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@torch.no_grad()
def generate(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    tag: str,
    max_tokens: int,
    *,
    samples: int = 0,
) -> list[list[str]]:
    """Returns one greedy answer per prompt, or `samples` answers at temperature 1 (seed torch before)."""
    copies = max(1, samples)
    answers: list[list[str]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, BATCH // copies)
    training = model.training
    model.eval()
    # Layers compiled for training would be recompiled for every length of the cache.
    with torch.compiler.set_stance("force_eager"), _for_generation(model):
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            width = max(len(prompts[i]) for i in numbers)
            ids = torch.full((len(numbers), width), chat.end_id)
            attention = torch.zeros(len(numbers), width, dtype=torch.long)
            for row, i in enumerate(numbers):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                attention[row, width - len(prompts[i]) :] = 1
            drawn = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                max_new_tokens=max_tokens,
                num_return_sequences=copies,
                **(SAMPLED if samples else {"do_sample": False}),
                pad_token_id=chat.end_id,
                eos_token_id=chat.end_id,
                use_cache=True,
            )[:, width:]
            for row, new in enumerate(drawn.tolist()):
                answers[numbers[row // copies]].append(_response(chat.decode(new), tag))
    model.train(training)
    return answers


@contextmanager
def _for_generation(model: Any) -> Iterator[None]:
    """Adds the adapters into the weights for the block, which makes a token several times cheaper; then restores
    the weights bit for bit."""
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    originals = [layer.base_layer.weight.data for layer in layers]
    attention = model.config._attn_implementation
    for layer, weight in zip(layers, originals, strict=True):
        layer.base_layer.weight.data = (weight + layer.get_delta_weight("default")).to(weight.dtype)
    model.set_attn_implementation("sdpa")  # faster here, though not in training on CPUs (finetune.model)
    # F.linear of a slice that isn't contiguous copies the head's weights once for every row of the batch.
    head = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        with model.disable_adapter() if layers else nullcontext():
            yield
    finally:
        head.remove()
        model.set_attn_implementation(attention)
        for layer, weight in zip(layers, originals, strict=True):
            layer.base_layer.weight.data = weight


def _response(text: str, tag: str) -> str:
    """The answer without its tag, as `engine.answer` shows it."""
    return text.split(tag, 1)[0].strip()
