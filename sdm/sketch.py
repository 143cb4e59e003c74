"""The sketch: an int8 copy of the support, a quarter of its bytes, that rules out most rows for a query.

Each centred exemplar s~ = s - centre and each centred query a~ is written as scaled small integers plus a remainder:

    s~ = sigma k + r,   a~ = alpha l + t,      k, l in -127..127, sigma, alpha > 0

The product of integers is exact, and by Cauchy-Schwarz

    D(a, s) - |a~|^2 = |s~|^2 - 2 sigma alpha (k . l) + e,    |e| <= 2 (|r| |a~ - t| + |s~| |t|) + rounding,

so that a row further than 2 max |e| from a decision can't change it. Each row's own |e| rules out more than half of
the others. The rest is computed in float32, and exactly where float32 does not decide (`sdm.similarity`). Decisions
are therefore the same to the bit, a query reads one byte an entry instead of four, and processors multiply bytes
several times as fast.

oneDNN computes the product, through the operator for quantised models. `multiplies_exactly` tests whether it exists
and is exact; if not, there is no sketch and float32 products are used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from candor.sdm.arithmetic import UNIT_32

LARGEST_CODE = 127
ZERO = 128
"""Offset of the query's codes as unsigned bytes."""
SMALLEST = 2**21
"""Minimum entries of a support for a sketch. Smaller supports fit in the processor's caches and gain nothing."""


class Sketch:
    """The sketch of finite exemplars h' (N, M) about centre (M,). nbytes: its memory in addition to theirs."""

    def __init__(self, h_prime: Tensor, centre: Tensor) -> None:
        self._centre = centre.double()
        codes, scales, norms, rests = [], [], [], []
        for rows in torch.split(h_prime, 4096):
            centred = rows.double() - self._centre
            code, scale = _quantise(centred)
            rests.append((centred - scale.double() * code).norm(dim=1).float())
            codes.append(-code)  # so that scales stay positive
            scales.append(2 * scale.squeeze(1))
            norms.append(centred.square().sum(dim=1))
        squares = torch.cat(norms)
        self._norms = squares.float()  # |s~|^2
        self._scales = torch.cat(scales)
        self._codes = _pack(torch.cat(codes))
        self._rests = torch.cat(rests)  # |r|
        self._rest = float(self._rests.max())
        self._longest = float(squares.max()) ** 0.5

    @property
    def nbytes(self) -> int:
        parts = (self._norms, self._scales, self._rests, self._codes)
        return sum(part.numel() * part.element_size() for part in parts)

    def distances(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Finite queries (b, M) -> (b, N) float32, each D(a, s) up to a constant a query and an error; and the
        lengths |a~ - t|, |t| (b, 2) float64 for `slack` and `pair_slack`."""
        centred = queries.double() - self._centre
        code, scale = _quantise(centred, together=True)
        written = scale.double() * code
        lengths = torch.stack([written.norm(dim=1), (centred - written).norm(dim=1)], dim=1)
        return _multiply(code, float(scale), self._codes, self._scales, self._norms), lengths

    def slack(self, lengths: Tensor) -> Tensor:
        """Upper bound on the error, over all rows: (b,) float64."""
        return self._bound(lengths, self._rest, self._longest)

    def pair_slack(self, lengths: Tensor, indices: Tensor) -> Tensor:
        """Upper bound on it for pairs with support rows indices (p,), each with its query's lengths (p, 2)."""
        return self._bound(lengths, self._rests[indices], self._norms[indices].sqrt())

    def _bound(self, lengths: Tensor, rest: Tensor | float, norm: Tensor | float) -> Tensor:
        written, lost = lengths.unbind(1)
        largest = self._longest**2 + 2 * (self._longest + self._rest) * written
        bound: Tensor = 1.01 * (2 * (rest * written + norm * lost) + 8 * UNIT_32 * largest)
        return bound


def _quantise(rows: Tensor, *, together: bool = False) -> tuple[Tensor, Tensor]:
    """Integers (n, M) int8 and scale (n, 1) float32, or () for all rows, with rows = scale * integers + rest."""
    largest = rows.abs().amax() if together else rows.abs().amax(dim=1, keepdim=True)
    scale = (largest / LARGEST_CODE).float().clamp(min=torch.finfo(torch.float32).tiny)
    limits = -LARGEST_CODE, LARGEST_CODE
    return (rows / scale.double()).round_().clamp_(*limits).to(torch.int8), scale


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def _multiply(left: Tensor, scale: float, packed: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """bias + scale * scales * (left . right), float32 (b, N)."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    # The left side is unsigned: without AMX, oneDNN multiplies signed bytes hundreds of times as slowly.
    unsigned = (left.short() + ZERO).to(torch.uint8)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, scale, ZERO, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@cache
def multiplies_exactly(width: int) -> bool:
    """Returns whether integer products of this width exist, and are right where sums of pairs overflow 16 bits."""
    alternating = torch.tensor([1, -1]).repeat((width + 1) // 2)[:width]
    extremes = (LARGEST_CODE * torch.stack([torch.ones_like(alternating), alternating])).to(torch.int8)
    extremes = torch.cat([extremes, -extremes])
    expected = extremes.double() @ extremes.double().T
    try:
        got = _multiply(extremes, 1.0, _pack(extremes), torch.ones(4), torch.zeros(4)).double()
    except (AttributeError, RuntimeError):
        return False
    return bool(((got - expected).abs() <= 4 * UNIT_32 * expected.abs()).all())
