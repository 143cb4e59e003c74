"""Finds rows in doubt, whose outcome depends on rounding and need not equal the recorded value exactly.

The fixtures' sens_* masks mark them; where a fixture has none, the same rules (README.json, "arrays") are
applied here. A row in doubt isn't left out: its q must lie between the counts on both sides of the doubt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.conformance.fixture import TOLERANCE
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.region import Region
from candor.sdm.sample_size import effective_sample_size
from candor.sdm.support import Support

NEAR = 1e-5
"""Relative difference of squared distances below which their order is in doubt."""


def q_range(
    h: Tensor, y_hat: Tensor, support: Support, max_q: int | None, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Least and greatest q, (n,) each, when distances may be off by `NEAR`; computed plainly in float64."""
    low, high = [], []
    for i, (row, c) in enumerate(zip(h.double(), y_hat.tolist(), strict=True)):
        distances = (support.h_prime.double() - row).square().sum(dim=1)
        valid = support.valid(c)
        present = torch.ones_like(valid)
        if exclude is not None:
            present[exclude[i]] = False
        invalid = distances[present & ~valid]
        edge = float(invalid.min()) if len(invalid) else torch.inf
        low.append(int((valid & present & (distances < edge * (1 - NEAR))).sum()))
        high.append(int((valid & present & (distances <= edge * (1 + NEAR))).sum()))
    counts = torch.tensor([low, high])
    counts = counts if max_q is None else counts.clamp(max=max_q)
    return counts[0], counts[1]


def d_in_doubt(d_nearest: Tensor, ecdf: ClasswiseECDF, h: Tensor, own: Tensor) -> Tensor:
    """(n,) bool: the distance is within `NEAR`, or within what float32 loses in |h|^2 - 2 h.s + |s|^2, of one
    in an eCDF. h (n, M): the rows' exemplar vectors; own (n, C): entries in E_c that are the row's own,
    which don't count."""
    noise = NEAR * d_nearest + 2.0**-23 * h.square().sum(dim=1)
    within = ecdf.count_below(d_nearest + noise) - ecdf.count_below(d_nearest - noise)
    return (within > own).any(dim=1)


def n_range(q_prime: Tensor, q_primes: ClasswiseECDF) -> tuple[Tensor, Tensor]:
    """Least and greatest effective sample size, (n, C) each, when q' may be off by 1e-5 (relative)."""
    return (
        effective_sample_size(q_prime * (1 - 1e-5), q_primes),
        effective_sample_size(q_prime * (1 + 1e-5), q_primes),
    )


def y_in_doubt(z_prime: Tensor) -> Tensor:
    """(n,) bool: the two largest logits are within 1e-4."""
    top = z_prime.topk(2, dim=1).values
    return top[:, 0] - top[:, 1] <= 1e-4


def possible_speakers(sdm: Tensor, votes: Tensor, y_hat: Tensor) -> Tensor:
    """(n, J) bool: which models may give the ensemble's estimate. sdm (n, J, C), votes (n, J), y_hat (n,).

    These vote y_hat with an SDM equal to the smallest, up to the error of two values: at d = 0 all have 1/C.
    """
    models = votes.shape[1]
    top = sdm.gather(2, y_hat.view(-1, 1, 1).expand(-1, models, 1)).squeeze(2)  # (n, J)
    top = top.masked_fill(votes != y_hat.unsqueeze(1), torch.inf)
    return top <= top.amin(dim=1, keepdim=True) + 2 * TOLERANCE


def admission_in_doubt(sdm: Tensor, q_prime: Tensor, region: Region) -> Tensor:
    """(n,) bool: q' is within 1e-4 (relative) of q'_min, or an SDM within 1e-4 of its threshold."""
    if not region.found:
        return torch.zeros(len(q_prime), dtype=torch.bool)
    near_q = (q_prime - region.q_prime_min).abs() <= 1e-4 * region.q_prime_min
    return near_q | ((sdm - region.psi).abs() <= 1e-4).any(dim=1)


def strangers(values: Tensor, among: Tensor) -> Tensor:
    """How many of `values` have no partner within tolerance in `among`; both ascending."""
    if not len(among):
        return torch.tensor(len(values))
    after = torch.searchsorted(among, values).clamp(max=len(among) - 1)
    gap = torch.minimum((among[after] - values).abs(), (among[(after - 1).clamp(min=0)] - values).abs())
    return (gap > TOLERANCE * values.abs().clamp(min=1)).sum()
