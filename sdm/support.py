"""The support: the training exemplars that a point is compared with, and exact nearest search over them.

    D(a, s) = |a - s|^2        squared L2, as in the public code (the papers: L2; the order is the same)

The distance of a pair is always `arithmetic.pair_distances`, a function of the two rows alone, so a row
has the same distances alone and in any batch. Computing all of them that way would take long, so a
matrix product finds the few that matter. With s~ = s - centre, a~ = a - centre,

    D(a, s) = |s~|^2 + |a~|^2 - 2 (s . a~) + 2 (centre . a~),

the product s . a~ in float32 differs from the exact one by at most gamma |s| |a~|, gamma = M 2^-24, in
any order of summation (Higham, eq. 3.5). The rough distance thus differs from the exact one by at most a
known `slack`. A row whose rough distance is more than twice the slack from a decision can't change it; the
others are computed exactly. Centring one side suffices to keep the slack small where exemplars
share a large common offset. Reading the support once is nearly the whole cost of a query; a large support
is therefore read through a sketch of it first (`sdm.sketch`).

Memory: queries are taken in blocks, so that rough distances never exceed `BLOCK` numbers, or one row of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.arithmetic import LARGEST, UNIT_32, pair_distances
from candor.sdm.sketch import SMALLEST, Sketch, multiplies_exactly

BLOCK = 2**23
"""Numbers held at once beside the support itself: 32 MiB, enough rows for an efficient matrix product."""


@dataclass(frozen=True, eq=False)
class Rough:
    """Rough distances of some queries. Up to a constant a query, the error of each is at most the slack.

    rows: the queries' positions; queries (b, M); distances (b, N) float32; slack (b,); lengths (b, 2): set if a
    sketch gave the distances, for its `pair_slack`.
    """

    rows: slice
    queries: Tensor
    distances: Tensor
    slack: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Support:
    """h_prime (N, M) float32, finite; labels (N,) int64, -1 unlabelled, -99 out of distribution;
    predictions (N,) int64. Row i is *valid* for class c iff labels[i] = predictions[i] = c."""

    h_prime: Tensor
    labels: Tensor
    predictions: Tensor

    def __post_init__(self) -> None:
        n = len(self.h_prime)
        if n == 0 or self.h_prime.dim() != 2 or self.labels.shape != (n,) or self.predictions.shape != (n,):
            raise ValueError(
                "a support needs h_prime (N, M) with N > 0 and labels, predictions (N,); got "
                f"{tuple(self.h_prime.shape)}, {tuple(self.labels.shape)}, {tuple(self.predictions.shape)}"
            )
        lowest, highest = torch.aminmax(self.h_prime, dim=1)
        known = (lowest >= -LARGEST) & (highest <= LARGEST)
        if not known.all():
            bad = (~known).nonzero().flatten().tolist()
            raise ValueError(f"support rows {bad[:10]} aren't finite or exceed {LARGEST:g}: leave them out")

    def __len__(self) -> int:
        return len(self.h_prime)

    @cached_property
    def _centre(self) -> Tensor:
        return self.h_prime.mean(dim=0)  # (M,)

    @cached_property
    def _norms(self) -> Tensor:
        parts = torch.split(self.h_prime, max(1, BLOCK // self.h_prime.shape[1]))
        return torch.cat([(part - self._centre).square().sum(dim=1) for part in parts])  # |s~|^2, (N,)

    @cached_property
    def _largest_norm(self) -> float:
        return float(self._norms.max())

    @cached_property
    def _longest(self) -> float:
        return float(self.h_prime.norm(dim=1).max())  # max |s|

    @cached_property
    def sketch(self) -> Sketch | None:
        """The sketch of a large support; None for a small one."""
        if self.h_prime.numel() < SMALLEST or not multiplies_exactly(self.h_prime.shape[1]):
            return None
        return Sketch(self.h_prime, self._centre)

    @cached_property
    def _valid(self) -> dict[int, Tensor]:
        return {}

    def valid(self, c: int) -> Tensor:
        """Which rows are valid for class c: (N,) bool, to read only."""
        if c not in self._valid:
            self._valid[c] = (self.labels == c) & (self.predictions == c)
        return self._valid[c]

    def updated(self, h_prime: Tensor, labels: Tensor, predictions: Tensor) -> Support:
        """A support with rows appended (2509.12760, A.6); earlier rows keep their index."""
        return Support(
            torch.cat([self.h_prime, h_prime.float()]),
            torch.cat([self.labels, labels.long()]),
            torch.cat([self.predictions, predictions.long()]),
        )

    def rough(self, queries: Tensor) -> Iterator[Rough]:
        """Rough distances of queries (n, M), block by block. Queries must be finite."""
        size = max(1, BLOCK // len(self))
        for start in range(0, len(queries), size):
            block = queries[start : start + size]
            centred = block - self._centre
            if len(block) == 1:
                distances = torch.addmv(self._norms, self.h_prime, centred[0], alpha=-2).unsqueeze(0)
            else:
                distances = torch.addmm(self._norms, centred, self.h_prime.T, alpha=-2)
            yield Rough(slice(start, start + len(block)), block, distances, self._slack(centred))

    def rough_pairs(self, queries: Tensor, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rough distances (p,) of pairs (queries[rows[i]], support row indices[i]), rows ascending; slack (b,)."""
        centred = queries - self._centre
        # A product with all rows, read in order, is faster than gathering many; its cost grows with the queries.
        if 2 * len(rows) > len(self) * min(len(queries), 8):
            products = (centred @ self.h_prime.T)[rows, indices]
        else:
            counts = torch.bincount(rows, minlength=len(queries)).tolist()
            parts = zip(torch.split(indices, counts), centred, strict=True)
            products = torch.cat([self.h_prime.index_select(0, part) @ query for part, query in parts])
        return torch.add(self._norms[indices], products, alpha=-2), self._slack(centred)

    def _slack(self, centred: Tensor) -> Tensor:
        """Bound (b,) on the error of rough distances for centred queries (b, M), doubled for safety."""
        length: Tensor = centred.double().norm(dim=1)
        unit = UNIT_32 if torch.get_float32_matmul_precision() == "highest" else 2.0**-8
        width = self.h_prime.shape[1]
        product = 2 * (unit + width * UNIT_32) * self._longest * length
        # |s~|^2 is a sum of `width` terms; the query's centring, and a few roundings of the total
        rest = (width + 8) * UNIT_32 * (self._largest_norm + length.square())
        return (2 * (product + rest)).float()

    def exact(self, queries: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        """Exact squared distances of the pairs (queries[rows[i]], support row indices[i]): float64."""
        size = max(1, BLOCK // (8 * self.h_prime.shape[1]))
        return torch.cat(
            [
                pair_distances(queries.index_select(0, r), self.h_prime.index_select(0, i))
                for r, i in zip(torch.split(rows, size), torch.split(indices, size), strict=True)
            ]
        )

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest rows: squared distances (n, k) float32 ascending, indices (n, k) int64.

        Ties in ascending index. k is at most N.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be in 1..{len(self)} (the support's size), got {k}")
        distances = torch.empty(len(queries), k)
        indices = torch.empty(len(queries), k, dtype=torch.int64)
        for block in self.rough(queries):
            kth = block.distances.kthvalue(k, dim=1).values
            for row, near in enumerate(block.distances <= (kth + 2 * block.slack).unsqueeze(1)):
                candidates = near.nonzero().flatten()
                exact = self.exact(block.queries, torch.full_like(candidates, row), candidates)
                order = exact.sort(stable=True)
                distances[block.rows][row] = order.values[:k].float()
                indices[block.rows][row] = candidates[order.indices[:k]]
        return distances, indices
