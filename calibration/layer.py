"""Trains one SDM layer on two halves (2509.12760, section 3 and A.1); `calibration.fit` runs the J rounds.

The epoch kept is the one with the lowest balanced calibration loss, the later one on ties.
The returned estimator is built again from the kept weights, by the arithmetic used for scoring
(sdm/arithmetic.py), with its regions from the calibration half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.calibration.epochs import Half, LayerSettings, run_epochs
from candor.sdm.adaptor import ExemplarAdaptor, fit_standardisation
from candor.sdm.conventions import DEFAULT, Conventions
from candor.sdm.estimator import SDMEstimator

__all__ = ["LayerSettings", "TrainedLayer", "split_halves", "train_layer"]

Progress = Callable[[int, float], None]
"""Called after every epoch with its number (from 1) and its balanced calibration loss."""


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """estimator: of the best epoch; losses: balanced calibration loss of every epoch, in order."""

    estimator: SDMEstimator
    best_epoch: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return self.losses[self.best_epoch - 1]


def train_layer(
    h_train: Tensor,
    y_train: Tensor,
    h_cal: Tensor,
    y_cal: Tensor,
    *,
    num_classes: int,
    generator: torch.Generator,
    alphas: Iterable[float] = (),
    settings: LayerSettings | None = None,
    conventions: Conventions = DEFAULT,
    progress: Progress | None = None,
) -> TrainedLayer:
    """Trains one layer on given halves: h (n, D) finite, labels (n,) in 0..C-1.

    generator draws the initial weights and every epoch's order. Raises ValueError on labels or states
    that can't be trained on, naming the rows.
    """
    settings = settings or LayerSettings()
    for name, h, y in (("training", h_train, y_train), ("calibration", h_cal, y_cal)):
        _check(name, h, y, num_classes)
    mean, scale = fit_standardisation(h_train, settings.blocks)
    adaptor = ExemplarAdaptor(mean, scale, settings.exemplar_dim, num_classes, generator)
    train = Half(adaptor.standardise(h_train), y_train.long())
    calibration = Half(adaptor.standardise(h_cal), y_cal.long())
    orders = (torch.randperm(len(h_train), generator=generator) for _ in range(settings.epochs))
    best_epoch, best, losses = 0, adaptor.state_dict(), []
    for epoch in run_epochs(adaptor, train, calibration, orders, settings, conventions):
        if not math.isfinite(epoch.loss):
            raise ValueError(f"the loss of epoch {epoch.number} isn't finite: lower the learning rate")
        losses.append(epoch.loss)
        if epoch.loss <= min(losses):
            best_epoch = epoch.number
            best = {name: value.clone() for name, value in adaptor.state_dict().items()}
        if progress is not None:
            progress(epoch.number, epoch.loss)
    adaptor.load_state_dict(best)
    estimator = SDMEstimator.fit(adaptor, (h_train, y_train), (h_cal, y_cal), alphas, conventions)
    return TrainedLayer(estimator, best_epoch, tuple(losses))


def split_halves(
    y: Tensor, generator: torch.Generator, conventions: Conventions = DEFAULT
) -> tuple[Tensor, Tensor]:
    """Row numbers of two random halves of labels (n,); the first has floor(n/2) rows.

    Stratified by default: a class's share is the same in both, up to one row.
    """
    shuffled = torch.randperm(len(y), generator=generator)
    if conventions.stratified:
        # Rows in class order are dealt alternately, which halves every class and the whole.
        shuffled = shuffled[y[shuffled].argsort(stable=True)]
        return shuffled[1::2], shuffled[::2]
    return shuffled[: len(y) // 2], shuffled[len(y) // 2 :]


def _check(name: str, h: Tensor, y: Tensor, num_classes: int) -> None:
    if h.dim() != 2 or y.shape != (len(h),):
        raise ValueError(
            f"{name} half: expected h (n, D) and labels (n,), got {tuple(h.shape)}, {tuple(y.shape)}"
        )
    wrong = ((y < 0) | (y >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{name} half: labels must be in 0..{num_classes - 1}; rows {wrong[:10]} aren't")
    broken = (~torch.isfinite(h).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"{name} half: states of rows {broken[:10]} aren't finite; leave those records out")
    missing = sorted(set(range(num_classes)) - set(y.tolist()))
    if missing:
        raise ValueError(f"{name} half: no rows of class {missing}; every class needs records in both halves")
