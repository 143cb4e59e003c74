"""Compares both halves with the support after every epoch; distances are kept and corrected for the change in W.

    q, d_nearest of training rows against the others, of calibration rows against all training rows

(arXiv 2509.12760, section 3.) The adaptor's offset cancels in distances, D_ij = |W (x_i - x_j)|^2. The change of W in
an epoch is nearly of low rank: the gradient of a batch has rank C and Adam only rescales it. With W + Q B, where
Q (M x R) is orthonormal, and S = W' Q + B' / 2,

    W' W  becomes  W' W + S B + B' S',
    D_ij  becomes  D_ij + e_i + e_j - 2 (S' x_i . B x_j + B x_i . S' x_j),    e_i = 2 S' x_i . B x_i,

a product of width 2 R + 2 in place of M. Q and B come from a range finder (Halko et al., 0909.4061). The remainder of
the change is measured, not assumed. Above `TOLERANCE`, a larger R is tried, and in the end all distances are computed
anew. Below it, the remainder is part of the next epoch's change, so it does not accumulate. Every `RENEWED` epochs
distances are computed anew to remove rounding errors.

Distances are in single precision, without the exact check that scoring makes (`sdm.similarity`), since rounding
errors in q do not matter here. With b_i the distance to the nearest row that isn't valid for row i's prediction,
q_i = #{j : D_ij < b_i}, since no invalid row is nearer than b_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from candor.sdm.similarity import Neighbourhood, least

ROWS = 128
"""Rows of distances computed and read at once, so that they stay in the CPU cache."""

KEPT = 2**27
"""Most numbers kept as distances of both halves (512 MiB); with more they are computed anew every epoch."""

RANK = 32
"""The R that is tried first; it is doubled each time."""

TOLERANCE = 1e-6
"""Largest remainder of W's change, relative to W in Frobenius norm: about the rounding error of h'."""

RENEWED = 50


class KeptDistances:
    """Distances to all training rows x (n, D), labels (n,) in 0..C-1, from these and from calibration rows (m, D)."""

    def __init__(self, train_x: Tensor, labels: Tensor, calibration_x: Tensor, num_classes: int) -> None:
        self._order = labels.argsort(stable=True)  # so that a class's columns are one slice
        self._bounds = [0, *torch.bincount(labels, minlength=num_classes).cumsum(0).tolist()]
        centre = train_x.mean(dim=0)
        self._train, self._calibration = train_x[self._order] - centre, calibration_x - centre
        n, m = len(train_x), len(calibration_x)
        self._keeps = n * (n + m) <= KEPT
        rows = (n, m) if self._keeps else (ROWS, ROWS)
        self._distances = tuple(torch.empty(size, n) for size in rows)
        self._weight: Tensor | None = None
        self._age = 0
        self._rank = RANK

    def neighbourhoods(
        self, weight: Tensor, train_y: Tensor, calibration_y: Tensor, max_q: int | None = None
    ) -> tuple[Neighbourhood, Neighbourhood]:
        """Neighbourhoods of both halves under W (M, D), with predictions (n,), (m,). max_q: as in `sdm.similarity`;
        one less for training rows."""
        factors = self._factors(weight)
        train_y = train_y[self._order]
        mispredicted = [
            low + (train_y[low:high] != c).nonzero().flatten()
            for c, (low, high) in enumerate(pairwise(self._bounds))
        ]
        train, calibration = (_images(x, weight, factors) for x in (self._train, self._calibration))
        support = train.columns()
        back = self._order.argsort()
        own_q, own = self._compare(0, train.rows(), support, train_y, mispredicted, factors is not None)
        q, nearest = self._compare(
            1, calibration.rows(), support, calibration_y, mispredicted, factors is not None
        )
        return (
            _neighbourhood(own_q[back], own[back], None if max_q is None else max_q - 1),
            _neighbourhood(q, nearest, max_q),
        )

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """S and B' (D, R) that correct the kept distances; None if distances must be computed anew."""
        if self._weight is not None and self._age < RENEWED:
            self._age += 1
            change = weight - self._weight
            allowed = TOLERANCE * weight.norm()
            rank = max(RANK, self._rank // 2)
            while 3 * rank <= len(weight):  # else the product is hardly narrower
                self._rank = rank
                probe = torch.randn(len(weight), rank, generator=torch.Generator().manual_seed(rank))
                basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ probe).Q).Q  # (M, R)
                step = basis.T @ change  # B
                learnt = basis @ step
                if (change - learnt).norm() <= allowed:
                    half = self._weight.T @ basis + step.T / 2
                    self._weight += learnt
                    return half, step.T
                rank *= 2
        self._weight, self._age = (weight.clone() if self._keeps else None), 1
        return None

    def _compare(
        self,
        half: int,
        rows: Tensor,
        support: Tensor,
        y: Tensor,
        mispredicted: Sequence[Tensor],
        corrects: bool,
    ) -> tuple[Tensor, Tensor]:
        """q (n,) int64 and the smallest distance (n,) of one half's rows."""
        found = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            place = start if self._keeps else 0
            distances = self._distances[half][place : place + len(part)]
            distances.addmm_(part, support.T, beta=int(corrects), alpha=-2)
            if half == 0:
                distances[:, start : start + len(part)].fill_diagonal_(torch.inf)
            found.append(self._read(distances, y[start : start + ROWS].unsqueeze(1), mispredicted))
        q, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        return q, nearest

    def _read(self, distances: Tensor, y: Tensor, mispredicted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """distances (b, n), predictions y (b, 1); mispredicted: each class's rows predicted as another class."""
        nearest = torch.stack([least(distances[:, a:b]) for a, b in pairwise(self._bounds)], dim=1)  # (b, C)
        wrong = torch.stack([least(distances.index_select(1, rows)) for rows in mispredicted], dim=1)
        boundary = torch.minimum(
            nearest.scatter(1, y, torch.inf).amin(dim=1, keepdim=True), wrong.gather(1, y)
        )
        return (distances < boundary).sum(dim=1, dtype=torch.int32).long(), nearest.amin(dim=1)


@dataclass(frozen=True, eq=False)
class _Images:
    """D_ij = own_i + own_j - 2 left_i . right_j: left, right (n, R), own (n,)."""

    left: Tensor
    right: Tensor
    own: Tensor

    def rows(self) -> Tensor:
        """D is -2 times the product of these with `columns`."""
        own = self.own.unsqueeze(1)
        return torch.cat([self.left, own / -2, torch.full_like(own, -0.5)], dim=1)

    def columns(self) -> Tensor:
        own = self.own.unsqueeze(1)
        return torch.cat([self.right, torch.ones_like(own), own], dim=1)


def _images(x: Tensor, weight: Tensor, factors: tuple[Tensor, Tensor] | None) -> _Images:
    """Images of rows x (n, D), for distances computed anew or for their correction by `factors`."""
    if factors is None:
        h_prime = x @ weight.T
        return _Images(h_prime, h_prime, h_prime.square().sum(dim=1))
    first, second = (x @ factor for factor in factors)
    both, swapped = torch.cat([first, second], dim=1), torch.cat([second, first], dim=1)
    return _Images(both, swapped, 2 * (first * second).sum(dim=1))


def _neighbourhood(q: Tensor, d_nearest: Tensor, max_q: int | None) -> Neighbourhood:
    return Neighbourhood(q.clamp(min=0, max=max_q), d_nearest.clamp(min=0), torch.full_like(q, -1))
