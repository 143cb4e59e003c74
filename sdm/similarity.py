"""Similarity: how many training points of the predicted class come before the first that disagrees.

    q = #{support rows valid for y_hat that are nearer than the nearest row that isn't},

the length of the leading run of valid rows when the support is ordered by distance (2509.12760, section
3). Decided here: equal distances are ordered by ascending support index; the count is exact and has no
cap unless `max_q` gives one; a row compared with a support it belongs to is left out by its index
(`exclude`). No top-k search: the nearest invalid row bounds the count, and counting needs no order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdm.conventions import DEFAULT, Conventions
from sdm.support import Rough, Support


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """q (n,) int64; d_nearest (n,) float32, squared distance to the nearest row; nearest (n,) int64."""

    q: Tensor
    d_nearest: Tensor
    nearest: Tensor


def neighbourhood(
    queries: Tensor,
    predictions: Tensor,
    support: Support,
    *,
    exclude: Tensor | None = None,
    max_q: int | None = None,
    exact: bool = True,
) -> Neighbourhood:
    """q, nearest distance and nearest row of queries (n, M), finite, with predictions y_hat (n,).

    exclude: (n,) support index that each query is not compared with.
    exact: False takes the rough distances at their word, for the many passes of training where a
        rounding's worth of q is no matter; it is faster, may depend on the batch, and leaves
        `nearest` at -1.
    If no row remains, d_nearest = inf and nearest = -1.
    """
    q = torch.empty(len(queries), dtype=torch.int64)
    d_nearest = torch.empty(len(queries))
    nearest = torch.empty(len(queries), dtype=torch.int64)
    count = _count_exactly if exact else _count_roughly
    for c in predictions.unique(sorted=True).tolist():
        valid = support.valid(c)
        members = (predictions == c).nonzero().squeeze(1)
        for block in support.rough(queries[members]):
            rows = members[block.rows]
            if exclude is not None:
                block.distances.scatter_(1, exclude[rows].unsqueeze(1), torch.inf)
            q[rows], d_nearest[rows], nearest[rows] = count(block, valid, support)
    return Neighbourhood(q if max_q is None else q.clamp(max=max_q), d_nearest, nearest)


def support_neighbourhood(
    support: Support, conventions: Conventions = DEFAULT, *, exact: bool = True
) -> Neighbourhood:
    """The support's own rows compared with the support, each leaving one row out."""
    queries, predictions = support.h_prime, support.predictions
    left_out = torch.arange(len(support))
    if conventions.self_exclusion == "first match":
        left_out = neighbourhood(queries, predictions, support).nearest
    max_q = None if conventions.max_q is None else conventions.max_q - 1
    return neighbourhood(queries, predictions, support, exclude=left_out, max_q=max_q, exact=exact)


Counts = tuple[Tensor, Tensor, Tensor]


def _count_roughly(block: Rough, valid: Tensor, support: Support) -> Counts:
    shortest = block.distances.amin(dim=1)
    boundary = _boundary(block, valid)
    q = ((block.distances < boundary.unsqueeze(1)) & valid).sum(dim=1, dtype=torch.int32)
    d_nearest = (shortest + block.offset).clamp(min=0).float()
    return q.long(), d_nearest, torch.full_like(q, -1, dtype=torch.int64)


def _count_exactly(block: Rough, valid: Tensor, support: Support) -> Counts:
    """Which rows the rough distances leave in doubt, and the exact distances of those.

    The nearest row lies within twice the slack of the smallest rough distance, and likewise the nearest
    invalid row; a valid row further than that below the latter is surely nearer.
    """
    rough, doubt = block.distances, 2 * block.slack
    # Finite bounds, so that a left-out row (at infinity) is in no one's doubt.
    largest = torch.finfo(torch.float32).max
    boundary = _boundary(block, valid)
    near = (rough.amin(dim=1) + doubt).clamp(max=largest).unsqueeze(1)
    surely = (boundary - doubt).clamp(max=largest).unsqueeze(1)
    maybe = (boundary + doubt).clamp(max=largest).unsqueeze(1)
    q = ((rough < surely) & valid).sum(dim=1, dtype=torch.int32)
    rows, indices = ((rough <= near) | ((rough >= surely) & (rough <= maybe))).nonzero(as_tuple=True)
    exact = support.exact(block.queries, rows, indices)

    d_nearest, nearest = _first(exact, rows, indices, len(rough))
    against = ~valid[indices]
    d_invalid, invalid = _first(exact[against], rows[against], indices[against], len(rough))
    edge = valid[indices] & (rough[rows, indices] >= surely[rows, 0])
    before = (exact < d_invalid[rows]) | ((exact == d_invalid[rows]) & (indices < invalid[rows]))
    return q.index_add_(0, rows, (edge & before).int()).long(), d_nearest.float(), nearest


def _boundary(block: Rough, valid: Tensor) -> Tensor:
    """The smallest rough distance of an invalid row, inf where there is none: (b,)."""
    return (block.distances + torch.where(valid, torch.inf, 0.0)).amin(dim=1)


def _first(exact: Tensor, rows: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Per query the first of its pairs by (distance, index): (count,) float64 and int64.

    (inf, -1) where a query has no pair.
    """
    shortest = torch.full((count,), torch.inf, dtype=torch.float64).scatter_reduce_(0, rows, exact, "amin")
    tied = exact == shortest[rows]
    last = torch.iinfo(torch.int64).max
    first = torch.full((count,), last).scatter_reduce_(0, rows[tied], indices[tied], "amin")
    return shortest, torch.where(first < last, first, -1)
