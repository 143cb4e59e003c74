"""Splits records into parts that share no prompt, each with its share of every class.

The parts must not leak into each other: training half and calibration half make the layer and its region,
the held-out part only reports. The layer would recognise a prompt that is in two parts instead of judging
it. So whole groups of records (one prompt each) are dealt out, in a seeded order, each to the part that
lacks its labels the most:

    part = argmax_p sum_y count_y(group) * (share_p * n_y - have_{p,y})

When every group is one record, each part has its exact share of every class, up to less than one record.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


def split(
    groups: Sequence[Hashable], labels: Sequence[int], shares: Sequence[float], seed: int
) -> list[torch.Tensor]:
    """Deals records 0..n-1 into `len(shares)` parts.

    groups: per record, equal for records that must stay together (the prompt's digest).
    labels: per record, the class to stratify by. shares: positive, summing to 1.
    Returns ascending int64 indices per part, which partition the records; the result is deterministic.
    Raises ValueError where lengths or shares are wrong.
    """
    if len(groups) != len(labels):
        raise ValueError(f"as many groups as labels expected, got {len(groups)} and {len(labels)}")
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares must be positive and sum to 1, got {list(shares)}")
    classes = {label: column for column, label in enumerate(sorted(set(labels)))}
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    blocks = list(members.values())
    order: list[int] = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    # Large groups go first, so that the small ones even them out. Stable: the seeded order decides among equals.
    order.sort(key=lambda block: -len(blocks[block]))

    totals = torch.zeros(len(classes), dtype=torch.float64)
    for label in labels:
        totals[classes[label]] += 1
    lacking = torch.tensor(shares, dtype=torch.float64)[:, None] * totals  # (parts, classes)
    parts: list[list[int]] = [[] for _ in shares]
    for block in order:
        count = torch.zeros(len(classes), dtype=torch.float64)
        for index in blocks[block]:
            count[classes[labels[index]]] += 1
        part = int(torch.argmax(lacking @ count))
        parts[part] += blocks[block]
        lacking[part] -= count
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in parts]


def draw(groups: Sequence[Hashable], share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rest, drawn): a random share of the whole groups, whatever their size and labels.

    Certificates need this: a stratified part is not an independent sample, since its labels depend on those of
    the other parts. Both are ascending int64 indices. Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to draw must be between 0 and 1, got {share}")
    distinct = list(dict.fromkeys(groups))
    order: list[int] = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {distinct[i] for i in order[: round(share * len(distinct))]}
    is_drawn = torch.tensor([group in chosen for group in groups], dtype=torch.bool)
    return (~is_drawn).nonzero().flatten(), is_drawn.nonzero().flatten()
