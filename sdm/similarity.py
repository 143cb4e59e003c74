"""Similarity: how many training points of the predicted class come before the first that disagrees.

    q = #{support rows valid for y_hat that are nearer than the nearest row that isn't},

the length of the leading run of valid rows when the support is ordered by distance (2509.12760, section
3). Decided here: equal distances are ordered by ascending support index; the count is exact and has no
cap unless `max_q` gives one; a row compared with a support it belongs to is left out by its index
(`exclude`). No top-k search: the nearest invalid row bounds the count, and counting needs no order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdm.conventions import DEFAULT, Conventions
from sdm.support import BLOCK, Support


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
) -> Neighbourhood:
    """q, nearest distance and nearest row of queries (n, M), finite, with predictions y_hat (n,).

    exclude: (n,) support index that each query is not compared with.
    If no row remains, d_nearest = inf and nearest = -1.
    """
    q = torch.empty(len(queries), dtype=torch.int64)
    d_nearest = torch.empty(len(queries))
    nearest = torch.empty(len(queries), dtype=torch.int64)
    for c in predictions.unique(sorted=True).tolist():
        valid = support.valid(c)
        members = (predictions == c).nonzero().squeeze(1)
        left_out = None if exclude is None else exclude[members]
        for block in _doubtful_pairs(queries[members], valid, support, left_out):
            rows = members[block.rows]
            q[rows], d_nearest[rows], nearest[rows] = _settle(block, queries[rows], valid, support)
    return Neighbourhood(q if max_q is None else q.clamp(max=max_q), d_nearest, nearest)


def support_neighbourhood(support: Support, conventions: Conventions = DEFAULT) -> Neighbourhood:
    """The support's own rows compared with the support, each leaving one row out."""
    queries, predictions = support.h_prime, support.predictions
    left_out = torch.arange(len(support))
    if conventions.self_exclusion == "first match":
        left_out = neighbourhood(queries, predictions, support).nearest
    max_q = None if conventions.max_q is None else conventions.max_q - 1
    return neighbourhood(queries, predictions, support, exclude=left_out, max_q=max_q)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """What is left to decide of the queries at `rows`.

    q (b,): valid rows that surely come before any invalid one. Pairs (queries[i], indices[i]), by position in the
    block and in the support: they hold each query's nearest row, its nearest invalid row, and every valid row that
    may come before that and isn't counted in q.
    """

    rows: slice
    q: Tensor
    queries: Tensor
    indices: Tensor


def _doubtful_pairs(
    queries: Tensor, valid: Tensor, support: Support, exclude: Tensor | None
) -> Iterator[_Pairs]:
    """By rough distances to all rows; of a large support, by its sketch first, then rough ones to what is left."""
    if support.sketch is None:
        for block in support.rough(queries):
            if exclude is not None:
                block.distances.scatter_(1, exclude[block.rows].unsqueeze(1), torch.inf)
            yield _Pairs(block.rows, *_sift(block.distances, block.slack, valid))
        return
    for start in range(0, len(queries), size := max(1, BLOCK // len(support))):
        rows = slice(start, start + size)
        distances, slack = support.sketch.distances(queries[rows])
        if exclude is not None:
            distances.scatter_(1, exclude[rows].unsqueeze(1), torch.inf)
        counted, who, indices = _sift(distances, slack, valid)
        rough, slack = support.rough_pairs(queries[rows], who, indices)
        # One line a query, as long as the longest.
        place = torch.arange(len(who)) - torch.searchsorted(who, who)
        width = int(place.max()) + 1 if len(place) else 0
        lines = torch.full((len(distances), width), torch.inf)
        lines[who, place] = rough
        known = torch.zeros((len(distances), width), dtype=torch.int64)
        known[who, place] = indices
        more, who, columns = _sift(lines, slack, valid[known])
        yield _Pairs(rows, counted + more, who, known[who, columns])


def _sift(distances: Tensor, slack: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What distances (b, k) within a slack (b,) of the truth tell: as `_Pairs`, with columns for indices.

    valid: (k,) or (b, k). The nearest row lies within twice the slack of the smallest distance, and likewise the
    nearest invalid row; a valid row further than that below the latter is surely nearer.
    """
    # Finite bounds, so that a left-out row (at infinity) is in no one's doubt.
    largest = torch.finfo(torch.float32).max
    doubt = 2 * slack.double()
    boundary = least(distances + torch.where(valid, torch.inf, 0.0)).double()
    near, surely, maybe = (
        bound.clamp(max=largest).float().unsqueeze(1)
        for bound in (least(distances).double() + doubt, boundary - doubt, boundary + doubt)
    )
    open_ = (distances <= near) | ((distances >= surely) & (distances <= maybe))
    q = ((distances < surely) & valid & ~open_).sum(dim=1, dtype=torch.int32).long()
    rows, columns = open_.nonzero(as_tuple=True)
    return q, rows, columns


def _settle(pairs: _Pairs, queries: Tensor, valid: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """q, d_nearest and nearest row (b,) of a block's queries (b, M), by the exact distances of what is left."""
    rows, indices = pairs.queries, pairs.indices
    exact = support.exact(queries, rows, indices)
    d_nearest, nearest = _first(exact, rows, indices, len(queries))
    against = ~valid[indices]
    d_invalid, invalid = _first(exact[against], rows[against], indices[against], len(queries))
    before = (exact < d_invalid[rows]) | ((exact == d_invalid[rows]) & (indices < invalid[rows]))
    return pairs.q.index_add(0, rows, (~against & before).long()), d_nearest.float(), nearest


def least(distances: Tensor) -> Tensor:
    """The smallest of each row: (b, k) -> (b,), inf where k = 0."""
    return distances.amin(dim=1) if distances.shape[1] else torch.full((len(distances),), torch.inf)


def _first(exact: Tensor, rows: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Per query the first of its pairs by (distance, index): (count,) float64 and int64.

    (inf, -1) where a query has no pair.
    """
    shortest = torch.full((count,), torch.inf, dtype=torch.float64).scatter_reduce_(0, rows, exact, "amin")
    tied = exact == shortest[rows]
    last = torch.iinfo(torch.int64).max
    first = torch.full((count,), last).scatter_reduce_(0, rows[tied], indices[tied], "amin")
    return shortest, torch.where(first < last, first, -1)
