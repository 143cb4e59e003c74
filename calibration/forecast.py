"""Fits what foretells an answer's score from its prompt, and says below which forecast no answer is begun.

    forecast    ridge regression of the cross-validated scores S on the prompts' states; penalty cross-validated too
    cut         at each threshold t a rank among the cross-validated forecasts of the records that the rule lets
                through at t: by `gates.rank_cut`, so that at most a stated share of such records is lost, with
                confidence

One regression serves all thresholds; only the cut depends on them. Cuts come from fitting records alone, so they are
fixed before the certification records are looked at, and the certificate is of the rule with its cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from candor.calibration.gates import rank_cut
from candor.sdm.adaptor import Block, fit_standardisation
from candor.sdm.forecast import ScoreForecast

PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1)
"""Tried penalties on |w|^2, in units of a typical row's squared length."""


def fit_forecast(
    prompts: Tensor, scores: Tensor, widths: Sequence[int], folds: Sequence[Tensor]
) -> tuple[ScoreForecast, Tensor]:
    """prompts (n, P), finite; scores (n,): cross-validated. widths: of the prompt states' blocks. folds: rows that
    share no prompt with the others.

    Returns the forecast, and forecasts (n,) float64, each fitted without its fold.
    """
    x, y = prompts.double(), scores.double()
    out_of_fold = y.new_empty(len(PENALTIES), len(y))
    for fold in folds:
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[fold] = False
        for row, (weight, bias) in zip(out_of_fold, _ridge(x[rest], y[rest], widths), strict=True):
            row[fold] = x[fold] @ weight + bias
    best = int((out_of_fold - y).square().mean(1).argmin())
    weight, bias = _ridge(x, y, widths)[best]
    return ScoreForecast(weight.float(), bias.float()), out_of_fold[best]


def forecast_min(forecasts: Tensor, reaching: Tensor, may_lose: float, delta: float) -> float:
    """The cut. forecasts (n,): cross-validated; reaching (n,) bool: what the rule lets through at a threshold, not
    nothing.

    Of what it lets through, forecasts below the cut have at most a share `may_lose`, with confidence 1 - delta over
    draws of these records; where they are too few to show that, none of them is lost.
    """
    ranked = forecasts[reaching].sort().values
    return float(ranked[rank_cut(len(ranked), may_lose, delta) - 1])


def _ridge(x: Tensor, y: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(w (P,), b ()) for each penalty: minimises |y - x w - b|^2 + penalty * mean |x|^2 * |w|^2, x standardised."""
    blocks: list[Block] = [(width, "scalar") for width in widths]
    mean, scale = x.mean(0), fit_standardisation(x, blocks)[1].double()
    centred = (x - mean) / scale
    values, axes = torch.linalg.eigh(centred @ centred.T)  # w lies in the rows' span
    typical = values.sum() / len(x)
    found = []
    for penalty in PENALTIES:
        shrunk = axes @ ((axes.T @ (y - y.mean())) / (values.clamp(min=0) + penalty * typical))
        w = centred.T @ shrunk / scale
        found.append((w, y.mean() - w @ mean))
    return found
