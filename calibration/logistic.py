"""Logistic regression with an L2 penalty, by Newton's method in float64; it is deterministic.

    minimise  sum_i log(1 + exp(f_i)) - y_i f_i  +  |w|^2 / 2 * mean |x|^2 / reach^2,        f = x w + b

reach is the prior standard deviation of a typical row's log-odds around b. It does not depend on the number of
columns or on their scale. b is not penalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from candor.calibration.errors import CalibrationError
from candor.sdm.adaptor import Block, fit_standardisation

STEPS = 100
TOLERANCE = 1e-10
"""Tolerance on the Newton decrement, the gain in log-likelihood that a further step could bring."""


def fit_logistic(x: Tensor, y: Tensor, reaches: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """(w (D,), b ()) float64 for each reach; each starts from the one before. x: (n, D), y: (n,) in {0, 1}.

    Raises ValueError where y holds one class only, since the intercept would be infinite.
    """
    if not 0 < int(y.sum()) < len(y):
        raise ValueError(
            f"logistic regression needs rows of both classes, got {int(y.sum())} right of {len(y)}"
        )
    x, y = x.double(), y.double()
    back, rows = None, x
    if x.shape[1] > len(x):  # w lies in the rows' span
        back, triangle = torch.linalg.qr(x.T)
        rows = triangle.T
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    typical = max(float(x.square().sum(1).mean()), 1e-300)
    beta = rows.new_zeros(rows.shape[1])
    beta[-1] = torch.logit(y.mean())
    found = []
    for reach in reaches:
        penalty = torch.full_like(beta, typical / reach**2)
        penalty[-1] = 0
        beta = _newton(rows, y, penalty, beta)
        w = beta[:-1] if back is None else back @ beta[:-1]
        found.append((w.clone(), beta[-1].clone()))
    return found


def fit_standardised(
    x: Tensor, y: Tensor, blocks: Sequence[Block], reaches: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """As `fit_logistic`; x is standardised inside by blocks, and the weights are for x as given.

    Raises CalibrationError where y holds one class only.
    """
    mean, scale = (one.double() for one in fit_standardisation(x, blocks))
    try:
        found = fit_logistic((x - mean) / scale, y, reaches)
    except ValueError as error:
        raise CalibrationError(
            f"no score can be fitted: {error}. Add records, above all of the rarer kind."
        ) from error
    return [(w / scale, b - (w / scale) @ mean) for w, b in found]


def cross_validated(
    x: Tensor, y: Tensor, blocks: Sequence[Block], folds: Sequence[Tensor], reaches: Sequence[float]
) -> list[Tensor]:
    """For each reach, log-odds (n,) of every row by weights that were fitted without its fold."""
    found = [x.new_empty(len(x)) for _ in reaches]
    for fold in folds:
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[fold] = False
        for into, (w, b) in zip(found, fit_standardised(x[rest], y[rest], blocks, reaches), strict=True):
            into[fold] = x[fold] @ w + b
    return found


class Chosen(NamedTuple):
    """What the reach of least cross-validated loss gives. out_of_fold (n,): log-odds without each row's own fold; w
    (D,) and b () of all rows, float64."""

    reach: float
    out_of_fold: Tensor
    w: Tensor
    b: Tensor


def fit_chosen(
    x: Tensor, y: Tensor, blocks: Sequence[Block], folds: Sequence[Tensor], reaches: Sequence[float]
) -> Chosen:
    """reaches: the strongest penalty first. Raises CalibrationError where y holds one class only."""
    tried = cross_validated(x, y, blocks, folds, reaches)
    best = min(range(len(reaches)), key=lambda at: float(log_loss(tried[at], y)))
    w, b = fit_standardised(x, y, blocks, reaches[: best + 1])[-1]
    return Chosen(reaches[best], tried[best], w, b)


def log_loss(f: Tensor, y: Tensor) -> Tensor:
    """Mean over rows with log-odds f (n,) and labels y (n,): () float64."""
    return torch.nn.functional.binary_cross_entropy_with_logits(f, y.double())


def _newton(rows: Tensor, y: Tensor, penalty: Tensor, beta: Tensor) -> Tensor:
    def objective(at: Tensor) -> Tensor:
        f = rows @ at
        return (torch.nn.functional.softplus(f) - y * f).sum() + (penalty * at.square()).sum() / 2

    value = objective(beta)
    for _ in range(STEPS):
        p = torch.sigmoid(rows @ beta)
        gradient = rows.T @ (p - y) + penalty * beta
        hessian = rows.T @ (rows * (p * (1 - p)).unsqueeze(1)) + torch.diag(penalty)
        # A tiny ridge is added because the intercept's curvature vanishes where all rows are certain.
        hessian.diagonal().add_(1e-12 * float(hessian.diagonal().max()) + 1e-300)
        factor = torch.linalg.cholesky(hessian)
        step = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
        decrement = float(gradient @ step)
        if decrement <= TOLERANCE:
            break
        size = 1.0
        while (tried := objective(beta - size * step)) > value - 1e-4 * size * decrement and size > 1e-8:
            size /= 2
        if size <= 1e-8:
            break
        beta, value = beta - size * step, tried
    return beta
