"""The epochs of training one SDM layer: minibatches, then both halves compared anew (2509.12760, section 3).

Epoch 1 trains with q = e - 2, d = 1, the softmax; every later one with q and d that the epoch before
left, held fixed. After every epoch both halves are embedded again and compared with the new support:
the training half against itself, each row left out of its own comparison and ranked by distances of
training rows; the calibration half against the training half. The criterion is the *balanced* loss on
the calibration half,

    (1/C) sum_c mean over calibration rows of class c of -log_{2+q} SDM(z')_y.

Costs. A step goes through V W (C x D) instead of h', and Adam is fused, so an epoch's time is in embedding
both halves and comparing them: two matrix products, whose distances are taken at single precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdm.activation import SOFTMAX_Q, balanced_loss, sdm_loss
from sdm.adaptor import Block, ExemplarAdaptor
from sdm.conventions import DEFAULT, Conventions
from sdm.distance import ClasswiseECDF
from sdm.similarity import neighbourhood, support_neighbourhood
from sdm.support import Support


@dataclass(frozen=True)
class LayerSettings:
    """The papers' values. blocks: how h is standardised (`fit_standardisation`); None, as one block."""

    exemplar_dim: int = 1000
    epochs: int = 200
    batch_size: int = 50
    learning_rate: float = 1e-5
    blocks: tuple[Block, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.exemplar_dim, self.epochs, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"exemplar_dim, epochs and batch_size must be at least 1 and learning_rate above 0: {self}"
            )


@dataclass(frozen=True, eq=False)
class Half:
    """Rows as training sees them: x (n, D) standardised float32, labels (n,) int64 in 0..C-1."""

    x: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """One half after an epoch: q (n,) int64; d_nearest (n,) squared, d (n,), losses (n,) float32; correct (n,)
    bool; class_loss (C,) float64, the losses' means by class."""

    q: Tensor
    d_nearest: Tensor
    d: Tensor
    losses: Tensor
    correct: Tensor
    class_loss: Tensor


@dataclass(frozen=True, eq=False)
class Epoch:
    """What one epoch left: number from 1, both halves' scores, loss = mean of calibration.class_loss."""

    number: int
    train: Scores
    calibration: Scores

    @property
    def loss(self) -> float:
        return float(self.calibration.class_loss.mean())


def run_epochs(
    adaptor: ExemplarAdaptor,
    train: Half,
    calibration: Half,
    orders: Iterable[Tensor],
    settings: LayerSettings,
    conventions: Conventions = DEFAULT,
    *,
    exact: bool = False,
) -> Iterator[Epoch]:
    """Trains `adaptor` in place, one epoch for each of `orders` (n,), permutations of the training rows.

    Adam without weight decay, schedule or clipping; the last batch may be short.
    exact: compare by the exact distances in every epoch too, which takes longer.
    """
    optimiser = torch.optim.Adam(adaptor.parameters(), lr=settings.learning_rate, fused=True)
    q = torch.full((len(train.x),), SOFTMAX_Q)
    d = torch.ones(len(train.x))
    for number, order in enumerate(orders, start=1):
        shuffled = (train.x[order], q[order], d[order], train.labels[order])
        batches = zip(*(torch.split(tensor, settings.batch_size) for tensor in shuffled), strict=True)
        for x, q_batch, d_batch, labels in batches:
            loss = sdm_loss(adaptor.logits(x), q_batch, d_batch, labels).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        after = Epoch(number, *score_halves(adaptor, train, calibration, conventions, exact))
        q, d = after.train.q.float(), after.train.d
        yield after


@torch.no_grad()
def score_halves(
    adaptor: ExemplarAdaptor,
    train: Half,
    calibration: Half,
    conventions: Conventions,
    exact: bool,
) -> tuple[Scores, Scores]:
    """Training and calibration half, compared with the support that `adaptor` makes of the former."""
    classes = adaptor.num_classes
    h_train, z_train = adaptor(train.x)
    h_cal, z_cal = adaptor(calibration.x)
    y_cal = z_cal.argmax(dim=1)
    support = Support(h_train, train.labels, z_train.argmax(dim=1))
    own = support_neighbourhood(support, conventions, exact=exact)
    near = neighbourhood(h_cal, y_cal, support, max_q=conventions.max_q, exact=exact)
    scores = []
    for half, z_prime, found in ((train, z_train, own), (calibration, z_cal, near)):
        ecdf = ClasswiseECDF.fit(found.d_nearest, found.q, half.labels, classes)
        d = ecdf.quantile(found.d_nearest, conventions)
        losses = sdm_loss(z_prime, found.q.float(), d, half.labels)
        class_loss = balanced_loss(losses, half.labels, classes)
        correct = z_prime.argmax(dim=1) == half.labels
        scores.append(Scores(found.q, found.d_nearest, d, losses, correct, class_loss))
    return scores[0], scores[1]
