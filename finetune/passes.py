"""Computes h or answers of many documents, spread over the processes of a run.

Every process makes the same number of forward passes, since wrapped models (FSDP) wait for each other in
each pass; a process without a document left repeats one and discards the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from candor.finetune.batches import Batch, collate
from candor.finetune.examples import Example


def spread(numbers: Sequence[int], size: int, rank: int, processes: int) -> Iterator[tuple[list[int], bool]]:
    """Yields this process's share of `numbers`, up to `size` at a time, and whether it counts."""
    for start in range(0, len(numbers), size * processes):
        share = list(numbers[start : start + size * processes][rank::processes])
        yield (share, True) if share else ([numbers[0]], False)


@torch.no_grad()
def rows(accelerator: Any, read: Callable[[Batch], Tensor], examples: Sequence[Example], size: int) -> Tensor:
    """Returns what `read` makes of every document, a row each: (n, D) float32 on the CPU, in order."""
    from accelerate.utils import gather_object

    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    mine: list[tuple[int, Tensor]] = []
    for numbers, counts in spread(order, size, accelerator.process_index, accelerator.num_processes):
        found = read(collate([examples[i] for i in numbers]).to(accelerator.device))
        if counts:
            mine += zip(numbers, found.float().cpu(), strict=True)
    everyone = mine if accelerator.num_processes == 1 else gather_object(mine)
    return torch.stack([row for _, row in sorted(everyone, key=lambda item: item[0])])


def states(accelerator: Any, scorer: Any, examples: Sequence[Example], size: int) -> Tensor:
    """Returns h of every document under the current model: (n, 2H)."""
    return rows(accelerator, lambda batch: scorer(batch, with_logits=False)[1], examples, size)


def answers(
    accelerator: Any,
    prompts: Sequence[Sequence[int]],
    answer: Callable[[list[Sequence[int]]], list[list[str]]],
) -> list[list[str]]:
    """Returns `answer` (`finetune.generation.generate`) for every prompt, in order; one process computes each."""
    from accelerate.utils import gather_object

    if not prompts:
        return []
    everyone: list[tuple[int, list[str]]] = []
    shares = spread(range(len(prompts)), len(prompts), accelerator.process_index, accelerator.num_processes)
    for numbers, counts in shares:
        found = zip(numbers, answer([prompts[i] for i in numbers]), strict=True)
        everyone += found if counts else []
    if accelerator.num_processes > 1:
        everyone = gather_object(everyone)
    return [texts for _, texts in sorted(everyone)]
