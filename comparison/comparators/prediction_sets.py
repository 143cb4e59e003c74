"""APS and RAPS: a row is admitted where its conformal prediction set holds one class.

    s(x, c) = sum of p_j over classes likelier than c  +  u p_c  +  lambda max(0, rank_c - 1)
    tau     = the ceil((n + 1) alpha)-th smallest s(x_i, y_i) of the calibration half
    set(x)  = {c : s(x, c) <= tau}

with u uniform in (0, 1), seeded, and ranks from 1. APS has lambda = 0 (Romano et al., 2006.02544). RAPS penalises
every class after the first (Angelopoulos et al., 2009.14193, k_reg = 1 as there are two classes), with lambda chosen
from their grid for the smallest mean set on a fifth of the calibration half. Our alpha (accuracy) is their 1 - alpha.

Both are implemented here in a few lines: MAPIE 1.6 refuses both for two classes, torchcp requires torchvision and
torch-geometric. Coverage 1 - alpha of sets is marginal over all rows; sets of size one have no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer

LAMBDAS = (0.001, 0.01, 0.1, 0.2, 0.5)


def fit_aps(fitting: Fitting) -> Scorer:
    p, y = fitting.calibration_rows.z_prime.double().softmax(1), fitting.calibration_labels
    return _scorer(fitting, p, y, 0.0)


def fit_raps(fitting: Fitting) -> Scorer:
    p, y = fitting.calibration_rows.z_prime.double().softmax(1), fitting.calibration_labels
    shuffled = torch.randperm(len(y), generator=fitting.generator())
    tuning, rest = shuffled[: len(y) // 5], shuffled[len(y) // 5 :]
    penalty = min(LAMBDAS, key=lambda each: _mean_size(p[tuning], y[tuning], each, fitting))
    return _scorer(fitting, p[rest], y[rest], penalty)


def scores(p: Tensor, penalty: float, generator: torch.Generator) -> Tensor:
    """s (n, C) of probabilities p (n, C)."""
    u = torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
    likelier = p.unsqueeze(1) > p.unsqueeze(2)  # [i, c, j]: is j likelier than c?
    above = (likelier * p.unsqueeze(1)).sum(2)
    return above + u * p + penalty * likelier.sum(2)


def conformal_quantile(values: Tensor, alpha: float) -> float:
    """The ceil((n + 1) alpha)-th smallest of n values; inf beyond the last."""
    rank = math.ceil((len(values) + 1) * alpha - 1e-9)
    return float(values.sort().values[rank - 1]) if rank <= len(values) else math.inf


def _scorer(fitting: Fitting, p: Tensor, y: Tensor, penalty: float) -> Scorer:
    taus = _taus(p, y, penalty, fitting.alphas, fitting.generator())

    def score(rows: Rows) -> MethodVerdicts:
        probabilities = rows.z_prime.double().softmax(1)
        s = scores(probabilities, penalty, fitting.generator())
        top, y_hat = probabilities.max(1)
        # Sets grow from the likeliest class, so a set of one holds y_hat.
        admitted = {alpha: (s <= tau).sum(1) == 1 for alpha, tau in taus.items()}
        return MethodVerdicts(y_hat, top, top, admitted)

    return score


def _taus(
    p: Tensor, y: Tensor, penalty: float, alphas: Sequence[float], generator: torch.Generator
) -> dict[float, float]:
    own = scores(p, penalty, generator).gather(1, y.unsqueeze(1)).squeeze(1)
    return {alpha: conformal_quantile(own, alpha) for alpha in alphas}


def _mean_size(p: Tensor, y: Tensor, penalty: float, fitting: Fitting) -> float:
    taus = _taus(p, y, penalty, fitting.alphas, fitting.generator())
    s = scores(p, penalty, fitting.generator())
    return sum(float((s <= tau).sum(1).double().mean()) for tau in taus.values())
