"""Bands around d: its possible error, given the number of calibration points below this one.

    n_c   = min(#{calibration q' of class c < q'}, N_c - 1)
    eps_c = sqrt(ln(2 / (1 - alpha)) / (2 n_c)),   1 if n_c = 0 or alpha = 1        (DKW inequality)
    d_lower, d_upper = clip(d -+ max_c eps_c, 0, 1)

(2509.12760, section 4.3.) The band holds with probability alpha. All calibration points of the class
count, including those with q' = 0. The cap at N_c - 1 is the public code's, and more cautious.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from candor.sdm.distance import ClasswiseECDF


def effective_sample_size(q_prime: Tensor, calibration: ClasswiseECDF) -> Tensor:
    """n_c: q' (n,), the calibration points' q' by true class -> (n, C) int64."""
    return torch.minimum(calibration.count_below(q_prime), (calibration.sizes() - 1).clamp(min=0))


def dkw_epsilon(sample_size: Tensor, alpha: float) -> Tensor:
    """eps: sample sizes of any shape -> same shape, float64, >= 0 (above 1 for tiny samples)."""
    if alpha >= 1:
        return torch.ones(sample_size.shape, dtype=torch.float64)
    width = torch.sqrt(math.log(2 / (1 - alpha)) / (2 * sample_size.double().clamp(min=1)))
    return torch.where(sample_size > 0, width, 1.0)


def band(d: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """d_lower, d_upper: (n,), (n,) -> float32 in [0, 1]."""
    return (d.double() - epsilon).clamp(0, 1).float(), (d.double() + epsilon).clamp(0, 1).float()
