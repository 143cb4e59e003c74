"""A prompt and several answers to it in one sequence: every answer sees the prompt and itself alone.

    ids        prompt | answer 1, tag | answer 2, tag | ...
    segment    0 ...  | 1 ...         | 2 ...         | ...     a position sees its own segment and 0, up to itself
    position   0 ...  | p ...         | p ...         | ...     p tokens of prompt

So the states are those of as many sequences, and the prompt is computed once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candor.calibration.data import load as load_records
from candor.engine.base import EVIDENCE
from candor.engine.prompt import ChatFormat
from candor.finetune.documents import TAG
from studies.two_gates.answers import load


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt with its m different answers, each with its tag. weight (m,): how often each was given.
    evidence (m, 6); label (m,) float32; frozen (m, H): the state at the tag of the model that answered."""

    digest: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: Tensor
    weight: Tensor
    evidence: Tensor
    frozen: Tensor

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def read(model: Path, records: Path, answers: Path) -> list[Asked]:
    """In the order of the records; answers that did not end on their own are left out, as are prompts without any."""
    chat, answered = ChatFormat.from_directory(model), load(answers)
    hidden = (answered.h.shape[1] - len(EVIDENCE)) // 2
    rows: dict[str, dict[str, list[int]]] = {}
    for row, (digest, text) in enumerate(zip(answered.digests, answered.texts, strict=True)):
        if answered.complete[row]:
            rows.setdefault(digest, {}).setdefault(text, []).append(row)
    found = []
    closing, _ = chat.closing(TAG)
    for record in load_records(records).records:
        if (given := rows.get(record.prompt_digest)) is None:
            continue
        first = [same[0] for same in given.values()]
        found.append(
            Asked(
                record.prompt_digest,
                tuple(chat.encode_chat(record.messages)),
                tuple((*chat.encode_response(text), *closing) for text in given),
                answered.labels[first].float(),
                torch.tensor([float(len(same)) for same in given.values()]),
                answered.h[first, 2 * hidden :],
                answered.h[first, hidden : 2 * hidden],
            )
        )
    return found


def first_answers(asked: Sequence[Asked], number: int, seed: int) -> list[Asked]:
    """Prompts in a random order, up to so many answers in all, those that were given several times counted so."""
    order = list(asked)
    random.Random(seed).shuffle(order)
    taken, total = [], 0
    for one in order:
        if total >= number:
            break
        taken.append(one)
        total += int(one.weight.sum())
    return taken


@dataclass(frozen=True, eq=False)
class Packed:
    """b prompts with a answers in all. ids, positions (b, L); mask (b, 1, L, L), 0 or -inf; tag (a,): index into
    b * L of each answer's last position; held (t,): likewise of those that predict an answer's or a tag's token.
    group (a,): the prompt of each answer, ascending."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    tag: Tensor
    held: Tensor
    group: Tensor

    def to(self, device: Any) -> Packed:
        return Packed(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pack(asked: Sequence[Asked], dtype: torch.dtype) -> Packed:
    width = max(one.length for one in asked)
    shape = (len(asked), width)
    ids, positions, segment = (torch.full(shape, fill) for fill in (0, 0, -1))
    tag, held, group = [], [], []
    for row, one in enumerate(asked):
        size = len(one.prompt)
        ids[row, :size] = torch.tensor(one.prompt)
        positions[row, :size] = torch.arange(size)
        segment[row, :size] = 0
        held.append(row * width + size - 1)
        end = size
        for number, answer in enumerate(one.answers, start=1):
            start, end = end, end + len(answer)
            ids[row, start:end] = torch.tensor(answer)
            positions[row, start:end] = torch.arange(size, size + len(answer))
            segment[row, start:end] = number
            held += range(row * width + start, row * width + end - 1)
            tag.append(row * width + end - 1)
            group.append(row)
    same = segment.unsqueeze(2) == segment.unsqueeze(1)  # (b, L, L)
    seen = (same | (segment == 0).unsqueeze(1)) & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
    return Packed(ids, positions, mask, torch.tensor(tag), torch.tensor(held), torch.tensor(group))
