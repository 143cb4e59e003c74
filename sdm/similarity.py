"""Similarity: the number of training points of the predicted class before the first that disagrees.

    q = #{support rows valid for y_hat that are nearer than the nearest row that isn't},

the length of the leading run of valid rows when the support is ordered by distance (2509.12760, section
3). Decided here: equal distances are ordered by ascending support index; the count is exact and has no
cap unless `max_q` gives one; a row compared with a support it belongs to is left out by its index
(`exclude`). No top-k search: the nearest invalid row bounds the count, and counting needs no order.

A more robust count passes over t invalid rows and subtracts t (`passed_over`, not in the papers):

    q = max(0, #{valid rows nearer than the (t + 1)-th invalid one} - t)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from candor.sdm.conventions import DEFAULT, Conventions
from candor.sdm.support import BLOCK, Rough, Support

FEW = 2**15
"""Numbers that are compared exactly at once, since ruling more of them out would take as long."""


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
    passed_over: int = 0,
) -> Neighbourhood:
    """q, nearest distance and nearest row of queries (n, M), finite, with predictions y_hat (n,).

    exclude: (n,) support index that each query is not compared with.
    If no row remains, d_nearest = inf and nearest = -1.
    """
    if passed_over:
        found = _passing_over(queries, predictions, support, exclude, passed_over)
        return found if max_q is None else replace(found, q=found.q.clamp(max=max_q))
    q = torch.empty(len(queries), dtype=torch.int64)
    d_nearest = torch.empty(len(queries))
    nearest = torch.empty(len(queries), dtype=torch.int64)
    order = predictions.argsort(stable=True)  # by class, so that one read of the support serves all
    for block in _rough(queries[order], support):
        members = order[block.rows]
        if exclude is not None:
            block.distances.scatter_(1, exclude[members].unsqueeze(1), torch.inf)
        classes, counts = predictions[members].unique_consecutive(return_counts=True)
        start = 0
        for c, count in zip(classes.tolist(), counts.tolist(), strict=True):
            part = slice(start, start := start + count)
            lengths = None if block.lengths is None else block.lengths[part]
            some = Rough(part, block.queries[part], block.distances[part], block.slack[part], lengths)
            valid, rows = support.valid(c), members[part]
            pairs = _doubtful_pairs(some, valid, support)
            q[rows], d_nearest[rows], nearest[rows] = _settle(pairs, some.queries, valid, support)
    return Neighbourhood(q if max_q is None else q.clamp(max=max_q), d_nearest, nearest)


def _passing_over(
    queries: Tensor, predictions: Tensor, support: Support, exclude: Tensor | None, passed_over: int
) -> Neighbourhood:
    """Query by query: every row that may come before the (t + 1)-th invalid one is put in exact order."""
    q = torch.zeros(len(queries), dtype=torch.int64)
    d_nearest = torch.full((len(queries),), torch.inf)
    nearest = torch.full((len(queries),), -1)
    valid = {c: support.valid(c) for c in predictions.unique().tolist()}
    for block in support.rough(queries):
        if exclude is not None:
            block.distances.scatter_(1, exclude[block.rows].unsqueeze(1), torch.inf)
        for row, (distances, slack) in enumerate(zip(block.distances, block.slack, strict=True)):
            number = block.rows.start + row
            against = ~valid[int(predictions[number])]
            ends = distances[against]
            last = ends.kthvalue(passed_over + 1).values if len(ends) > passed_over else torch.inf
            indices = ((distances <= last + 2 * slack) & distances.isfinite()).nonzero().squeeze(1)
            if not len(indices):
                continue
            exact = support.exact(block.queries, torch.full_like(indices, row), indices)
            exact, order = exact.sort(stable=True)
            invalid = against[indices[order]].cumsum(0)  # number of invalid rows up to here
            before = int((invalid <= passed_over).sum())
            q[number] = max(0, before - min(int(invalid[-1]), passed_over) - passed_over)
            d_nearest[number], nearest[number] = exact[0].float(), indices[order[0]]
    return Neighbourhood(q, d_nearest, nearest)


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
    """The pairs that are still undecided for some queries.

    q (b,): valid rows that surely come before any invalid one. Pairs (queries[i], indices[i]), by position among the
    queries and in the support: they hold each query's nearest row, its nearest invalid row, and every valid row that
    may come before that and isn't counted in q.
    """

    q: Tensor
    queries: Tensor
    indices: Tensor


def _rough(queries: Tensor, support: Support) -> Iterator[Rough]:
    """Rough distances to all rows; those of a large support from its sketch."""
    if support.sketch is None:
        yield from support.rough(queries)
        return
    for start in range(0, len(queries), size := max(1, BLOCK // len(support))):
        rows = slice(start, start + size)
        distances, lengths = support.sketch.distances(queries[rows])
        yield Rough(rows, queries[rows], distances, support.sketch.slack(lengths), lengths)


def _doubtful_pairs(rough: Rough, valid: Tensor, support: Support) -> _Pairs:
    """Returns the undecided pairs of queries of one class. After a sketch, it narrows them by each row's own error,
    then, where many are left, in float32."""
    pairs = _Pairs(*_sift(rough.distances, rough.slack, valid))
    few = len(pairs.indices) * support.h_prime.shape[1] <= FEW
    if few or support.sketch is None or rough.lengths is None:
        return pairs
    distances = rough.distances[pairs.queries, pairs.indices]
    slack = support.sketch.pair_slack(rough.lengths[pairs.queries], pairs.indices)
    pairs = _narrow(pairs, distances, slack, valid)
    if len(pairs.indices) * support.h_prime.shape[1] <= FEW:
        return pairs
    distances, slack = support.rough_pairs(rough.queries, pairs.queries, pairs.indices)
    return _narrow(pairs, distances, slack[pairs.queries], valid)


def _narrow(pairs: _Pairs, distances: Tensor, slack: Tensor, valid: Tensor) -> _Pairs:
    """Returns the pairs (p,) still undecided, given distances that are each within a slack (p,) of the exact."""
    who, indices, count = pairs.queries, pairs.indices, len(pairs.q)
    lower, upper = distances.double() - slack, distances.double() + slack
    against = ~valid[indices]

    near = _smallest(upper, who, count)[who]
    first, last = (_smallest(bounds[against], who[against], count)[who] for bounds in (lower, upper))
    open_ = (lower <= near) | ((upper >= first) & (lower <= last))
    counted = pairs.q.index_add(0, who, (~open_ & ~against & (upper < first)).long())
    return _Pairs(counted, who[open_], indices[open_])


def _sift(distances: Tensor, slack: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the fields of `_Pairs`, given distances (b, k) within a slack (b,) of the exact ones.

    valid: (k,). The nearest row lies within twice the slack of the smallest distance, and likewise the
    nearest invalid row; a valid row further than that below the latter is surely nearer.
    """
    # Finite bounds, so that a left-out row (at infinity) is never undecided.
    largest = torch.finfo(torch.float32).max
    doubt = 2 * slack.double()
    boundary = least(torch.where(valid, torch.inf, distances)).double()
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


def _smallest(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Of each query's pairs: values, rows (p,) -> (count,) float64, inf where it has none."""
    return torch.full((count,), torch.inf, dtype=torch.float64).scatter_reduce_(0, rows, values, "amin")


def _first(exact: Tensor, rows: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Per query the first of its pairs by (distance, index): (count,) float64 and int64.

    (inf, -1) where a query has no pair.
    """
    shortest = _smallest(exact, rows, count)
    tied = exact == shortest[rows]
    last = torch.iinfo(torch.int64).max
    first = torch.full((count,), last).scatter_reduce_(0, rows[tied], indices[tied], "amin")
    return shortest, torch.where(first < last, first, -1)
