"""Groups documents into batches of tensors, with the positions of the loss and of h."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.finetune.examples import Example


@dataclass(frozen=True, eq=False)
class Batch:
    """B documents of up to L tokens with T target tokens in all.

    ids, attention: (B, L). tag: (B,) position of the verification tag's last token, where h is taken.
    predicting: (T,) index into B * L of the state before a target. targets: (T,) token ids.
    document: (T,) row of each target, ascending.
    """

    ids: Tensor
    attention: Tensor
    tag: Tensor
    predicting: Tensor
    targets: Tensor
    document: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(examples: Sequence[Example]) -> Batch:
    """Makes a batch, padded on the right, which does not change causal states."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    attention = torch.zeros(len(examples), width, dtype=torch.long)
    predicting: list[int] = []
    targets: list[int] = []
    document: list[int] = []
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        attention[row, :length] = 1
        predicting += range(row * width + example.learnt - 1, row * width + length - 1)
        targets += example.ids[example.learnt :]
        document += [row] * (length - example.learnt)
    tag = torch.tensor([example.tag for example in examples])
    return Batch(ids, attention, tag, *map(torch.tensor, (predicting, targets, document)))


def shuffled_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Returns document numbers in batches of `size`, in random order. A batch has documents of similar length, so
    that it has little padding. The same rng state gives the same batches."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches
