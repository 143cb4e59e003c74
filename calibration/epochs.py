"""The epochs of training one SDM layer: minibatches, then both halves compared anew (2509.12760, section 3).

Epoch 1 trains with q = e - 2, d = 1, which is the softmax. Every later epoch trains with q and d of the
epoch before, held fixed. After every epoch both halves are embedded again and compared with the new
support. The training half is compared with itself, each row left out of its own comparison and ranked by
distances of training rows; the calibration half is compared with the training half. The criterion is the
*balanced* loss on the calibration half,

    (1/C) sum_c mean over calibration rows of class c of -log_{2+q} SDM(z')_y.

Costs. h' and z' are linear in x, so a step needs no h': with A = V W (C x D) the logits are A x, and with the logits'
gradients G (B x C) and R = G' x (C x D) the weights' are

    dL/dW = V' R,    dL/dV = R W' + (sum of G) b',

outer products of rank C. They are made a block of rows at a time, stepped by Adam and folded into the next A
while the block is in the CPU cache (`Weights.step`). The remaining costs are Adam's arithmetic and the comparison of
both halves after an epoch (`calibration.distances`), in single precision, which mostly needs no h' either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.calibration.distances import KeptDistances
from candor.sdm.activation import SOFTMAX_Q, balanced_loss, sdm_loss, sdm_loss_gradient
from candor.sdm.adaptor import Block, ExemplarAdaptor
from candor.sdm.conventions import DEFAULT, Conventions
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.similarity import Neighbourhood, neighbourhood, support_neighbourhood
from candor.sdm.support import Support

BLOCK_ROWS = 100
"""Rows of W stepped at once; they and their gradient fit in a second-level CPU cache."""


@dataclass(frozen=True)
class LayerSettings:
    """The papers' values. blocks: how h is standardised (`fit_standardisation`); None: as one block."""

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
class HalfScores:
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
    """The result of one epoch: its number from 1, both halves' scores, loss = mean of calibration.class_loss."""

    number: int
    train: HalfScores
    calibration: HalfScores

    @property
    def loss(self) -> float:
        return float(self.calibration.class_loss.mean())


class Weights:
    """The adaptor's weights in one matrix [W | b | V'] (M, D + 1 + C), with Adam's moments, and c (C,).

    Adam without weight decay, schedule or clipping (betas 0.9 and 0.999, eps 1e-8).
    """

    def __init__(self, adaptor: ExemplarAdaptor, learning_rate: float) -> None:
        self._adaptor = adaptor
        self._rate = learning_rate
        self._width = adaptor.input_dim + 1
        exemplar, head = adaptor.exemplar, adaptor.head
        with torch.no_grad():
            rows = torch.cat([exemplar.weight, exemplar.bias.unsqueeze(1), head.weight.T], dim=1)
            self._parts = [self._part(block) for block in torch.split(rows, BLOCK_ROWS)]
            self._offset = self._part(head.bias.clone())
            self.collapsed = head.weight @ rows[:, : self._width]  # [A | V b], (C, D + 1)
        self._gradient = torch.empty(BLOCK_ROWS, rows.shape[1])
        self._steps = torch.zeros(())

    @staticmethod
    def _part(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values and both moments."""
        return values, torch.zeros_like(values), torch.zeros_like(values)

    def logits(self, x: Tensor) -> Tensor:
        """z' (B, C) of x (B, D)."""
        return x @ self.collapsed[:, :-1].T + self.collapsed[:, -1] + self._offset[0]

    def step(self, x: Tensor, gradient: Tensor) -> None:
        """One step down dL/dz' (B, C), the gradient at the logits of x (B, D)."""
        total = gradient.sum(dim=0)  # (C,)
        pulled = torch.cat([gradient.T @ x, total.unsqueeze(1)], dim=1)  # (C, D + 1)
        collapsed = torch.zeros_like(self.collapsed)
        self._steps += 1
        for part in self._parts:
            inner, head = part[0][:, : self._width], part[0][:, self._width :]  # [W | b], V'
            slope = self._gradient[: len(inner)]
            torch.mm(head, pulled, out=slope[:, : self._width])
            slope[:, self._width :] = (pulled @ inner.T).T
            self._adam(part, slope)
            collapsed.addmm_(head.T, inner)
        self._adam(self._offset, total)
        self.collapsed = collapsed

    def _adam(self, part: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> None:
        values, first, second = part
        # torch.optim.Adam(fused=True) calls this too, but would make the blocks wait for each other.
        torch._fused_adam_(
            [values],
            [gradient],
            [first],
            [second],
            [],
            [self._steps],
            lr=self._rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    @torch.no_grad()
    def write(self) -> None:
        """Writes the weights back to the adaptor they came from."""
        rows = torch.cat([part[0] for part in self._parts])
        self._adaptor.exemplar.weight.copy_(rows[:, : self._width - 1])
        self._adaptor.exemplar.bias.copy_(rows[:, self._width - 1])
        self._adaptor.head.weight.copy_(rows[:, self._width :].T)
        self._adaptor.head.bias.copy_(self._offset[0])


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

    The last batch may be short. exact: compare by exact distances, as scoring does; this takes longer.
    """
    weights = Weights(adaptor, settings.learning_rate)
    # Only exact distances decide which of two identical rows is found first.
    exact = exact or conventions.self_exclusion == "first match"
    kept = None if exact else KeptDistances(train.x, train.labels, calibration.x, adaptor.num_classes)
    q = torch.full((len(train.x),), SOFTMAX_Q)
    d = torch.ones(len(train.x))
    for number, order in enumerate(orders, start=1):
        shuffled = (train.x[order], q[order], d[order], train.labels[order])
        batches = zip(*(torch.split(tensor, settings.batch_size) for tensor in shuffled), strict=True)
        for x, q_batch, d_batch, labels in batches:
            weights.step(x, sdm_loss_gradient(weights.logits(x), q_batch, d_batch, labels))
        weights.write()
        if kept is None:
            scores = score_halves(adaptor, train, calibration, conventions)
        else:
            z_train, z_cal = weights.logits(train.x), weights.logits(calibration.x)
            own, near = kept.neighbourhoods(
                adaptor.exemplar.weight.detach(),
                z_train.argmax(dim=1),
                z_cal.argmax(dim=1),
                conventions.max_q,
            )
            scores = (
                _scores(train.labels, z_train, own, adaptor.num_classes, conventions),
                _scores(calibration.labels, z_cal, near, adaptor.num_classes, conventions),
            )
        after = Epoch(number, *scores)
        q, d = after.train.q.float(), after.train.d
        yield after


@torch.no_grad()
def score_halves(
    adaptor: ExemplarAdaptor, train: Half, calibration: Half, conventions: Conventions
) -> tuple[HalfScores, HalfScores]:
    """Scores both halves by exact distances, with the support that `adaptor` makes of the training half."""
    classes = adaptor.num_classes
    h_train, z_train = adaptor(train.x)
    h_cal, z_cal = adaptor(calibration.x)
    support = Support(h_train, train.labels, z_train.argmax(dim=1))
    own = support_neighbourhood(support, conventions)
    near = neighbourhood(h_cal, z_cal.argmax(dim=1), support, max_q=conventions.max_q)
    return (
        _scores(train.labels, z_train, own, classes, conventions),
        _scores(calibration.labels, z_cal, near, classes, conventions),
    )


def _scores(
    labels: Tensor, z_prime: Tensor, found: Neighbourhood, classes: int, conventions: Conventions
) -> HalfScores:
    ecdf = ClasswiseECDF.fit(found.d_nearest, found.q, labels, classes)
    d = ecdf.quantile(found.d_nearest, conventions)
    losses = sdm_loss(z_prime, found.q.float(), d, labels)
    correct = z_prime.argmax(dim=1) == labels
    return HalfScores(found.q, found.d_nearest, d, losses, correct, balanced_loss(losses, labels, classes))
