"""Both halves compared with the support, as training asks after every epoch: many times, and at single precision.

    q, d_nearest of training rows against the others, of calibration rows against all of them

(arXiv 2509.12760, section 3.) A rounding's worth of q is no matter here, so distances come from matrix
products as they are, |a|^2 + |s|^2 - 2 a . s over centred rows, without the exact check that scoring makes
(`sdm.similarity`). Every distance is looked at once or twice: rows predicted alike stand together, the valid
ones first, so that a class's valid rows are one slice; and of the training half's distances to itself, which
are symmetric, half are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdm.similarity import Neighbourhood
from sdm.support import BLOCK

TILE = 512
"""Rows of a product: enough to be efficient, few enough that little is computed on both sides of the diagonal."""

SYMMETRIC = 2**26
"""Numbers that all distances of the training half may take, 256 MiB; above, they are computed tile by tile."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """Rows in an order in which those predicted alike stand together, the valid ones first.

    h_prime (N, M) in that order, less centre (M,), their mean; norms (N,) = |h'|^2; order (N,): where each row
    came from; starts, valid_ends, ends: per class the bounds of its rows and of its valid ones.
    """

    h_prime: Tensor
    centre: Tensor
    norms: Tensor
    order: Tensor
    starts: list[int]
    valid_ends: list[int]
    ends: list[int]

    @classmethod
    def of(cls, h_prime: Tensor, labels: Tensor, predictions: Tensor, num_classes: int) -> Grouped:
        valid = labels == predictions
        order = (2 * predictions + (~valid).long()).argsort(stable=True)
        sizes = torch.bincount(predictions, minlength=num_classes)
        ends = sizes.cumsum(0)
        valid_ends = ends - sizes + torch.bincount(predictions[valid], minlength=num_classes)
        centre = h_prime.mean(dim=0)
        rows = h_prime[order].sub_(centre)
        norms = rows.square().sum(dim=1)
        starts = (ends - sizes).tolist()
        return cls(rows, centre, norms, order, starts, valid_ends.tolist(), ends.tolist())

    def count(self, distances: Tensor, c: int) -> tuple[Tensor, Tensor]:
        """q (b,) int64 and the smallest distance (b,) of rows predicted c with distances (b, N) to these rows."""
        inside = distances[:, self.starts[c] : self.valid_ends[c]]
        before, after = distances[:, : self.starts[c]], distances[:, self.valid_ends[c] :]
        boundary = torch.minimum(_least(before), _least(after))
        q = (inside < boundary.unsqueeze(1)).sum(dim=1, dtype=torch.int32).long()
        return q, torch.minimum(boundary, _least(inside))


def compare_own(support: Grouped, max_q: int | None = None) -> Neighbourhood:
    """Every row against the others, in the order the rows came in. max_q: as in `sdm.similarity`; one less here."""
    q = torch.empty(len(support.order), dtype=torch.int64)
    shortest = torch.empty(len(support.order))
    for start, distances in _own_distances(support):
        stop = start + len(distances)
        distances[:, start:stop].fill_diagonal_(torch.inf)
        for c in range(len(support.ends)):
            low, high = max(start, support.starts[c]), min(stop, support.ends[c])
            if low < high:
                q[low:high], shortest[low:high] = support.count(distances[low - start : high - start], c)
    back = support.order.argsort()
    return _neighbourhood(q[back], (shortest + support.norms)[back], None if max_q is None else max_q - 1)


def compare_others(
    queries: Tensor, predictions: Tensor, support: Grouped, max_q: int | None = None
) -> Neighbourhood:
    """Other rows h' (n, M), with predictions (n,), against the support."""
    q = torch.empty(len(queries), dtype=torch.int64)
    shortest = torch.empty(len(queries))
    for c in range(len(support.ends)):
        members_of_class = (predictions == c).nonzero().flatten()
        for members in torch.split(members_of_class, max(1, BLOCK // len(support.order))):
            rows = queries[members].sub_(support.centre)
            distances = torch.addmm(support.norms, rows, support.h_prime.T, alpha=-2)
            q[members], least = support.count(distances, c)
            shortest[members] = least + rows.square().sum(dim=1)
    return _neighbourhood(q, shortest, max_q)


def _own_distances(support: Grouped) -> Iterator[tuple[int, Tensor]]:
    """Distances of the rows to each other up to each row's own norm, as (first row, (b, N)) for tiles of rows."""
    n, rows, norms = len(support.order), support.h_prime, support.norms
    if n * n > SYMMETRIC:
        for start in range(0, n, TILE):
            yield start, torch.addmm(norms, rows[start : start + TILE], rows.T, alpha=-2)
        return
    products = torch.empty(n, n)
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        torch.mm(rows[start:stop], rows[start:].T, out=products[start:stop, start:])
        products[stop:, start:stop] = products[start:stop, stop:].T
        yield start, torch.add(norms, products[start:stop], alpha=-2)


def _least(distances: Tensor) -> Tensor:
    """The smallest of each row: (b, k) -> (b,), inf where k = 0."""
    return distances.amin(dim=1) if distances.shape[1] else torch.full((len(distances),), torch.inf)


def _neighbourhood(q: Tensor, d_nearest: Tensor, max_q: int | None) -> Neighbourhood:
    return Neighbourhood(q.clamp(min=0, max=max_q), d_nearest.clamp(min=0), torch.full_like(q, -1))
