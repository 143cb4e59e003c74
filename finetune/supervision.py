"""The SDM layer that supervises an epoch, and its output for a document (arXiv 2510.26183, section 4).

At the start of an epoch, a layer is trained on the documents' states under the current model: random halves, each
document shown right or wrong. The layer is then fixed and gives every document of the epoch the base of its loss,

    beta = 2 + SDM(z')_r,      r = 1 for a right answer, 0 for a wrong one.

A document of its support is compared without itself, excluded by index, and ranked among the distances of training
documents; the others are treated as new points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from candor.calibration.epochs import LayerSettings
from candor.calibration.layer import split_halves, train_layer
from candor.sdm.activation import sdm
from candor.sdm.adaptor import FrozenAdaptor
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.estimator import SDMEstimator
from candor.sdm.similarity import neighbourhood, support_neighbourhood

NUM_CLASSES = 2


@dataclass(frozen=True, eq=False)
class Supervision:
    """own_ecdf: distances among the support's own documents. row: (n,) support row of each document, -1 if it is
    not in the support."""

    estimator: SDMEstimator
    own_ecdf: ClasswiseECDF
    row: Tensor

    @classmethod
    def train(cls, h: Tensor, y: Tensor, settings: LayerSettings, seed: int) -> Supervision:
        """Trains it. h: (n, 2H) of all documents. y: (n,), 1 if shown right. Raises ValueError as `train_layer`."""
        generator = torch.Generator().manual_seed(seed)
        train, calibration = split_halves(y, generator)
        layer = train_layer(
            h[train],
            y[train],
            h[calibration],
            y[calibration],
            num_classes=NUM_CLASSES,
            generator=generator,
            settings=settings,
        )
        row = torch.full((len(y),), -1)
        row[train] = torch.arange(len(train))
        return cls._of(layer.estimator, row)

    @classmethod
    def _of(cls, estimator: SDMEstimator, row: Tensor) -> Supervision:
        own = support_neighbourhood(estimator.support, estimator.conventions)
        labels = estimator.support.labels
        return cls(estimator, ClasswiseECDF.fit(own.d_nearest, own.q, labels, NUM_CLASSES), row)

    @cached_property
    def _projection(self) -> FrozenAdaptor:
        return FrozenAdaptor(self.estimator.adaptor)

    def sdm_at(self, h: Tensor, documents: Tensor, r: Tensor) -> Tensor:
        """SDM(z')_r: current h (b, 2H), document numbers (b,), r (b,) in {0, 1} -> (b,) in [0, 1]."""
        h_prime, z_prime, y_hat, finite = self._projection(h)
        support, conventions = self.estimator.support, self.estimator.conventions
        row = self.row[documents]
        q, d = torch.zeros(len(h)), torch.zeros(len(h))
        for members, ecdf, exclude in (
            (row >= 0, self.own_ecdf, row),
            (row < 0, self.estimator.ecdf, None),
        ):
            if members.any():
                near = neighbourhood(
                    h_prime[members],
                    y_hat[members],
                    support,
                    exclude=None if exclude is None else exclude[members],
                    max_q=conventions.max_q,
                )
                q[members] = near.q.float()
                d[members] = ecdf.quantile(near.d_nearest, conventions)
        q, d = q.where(finite, 0), d.where(finite, 0)
        return sdm(z_prime, q, d).gather(1, r.unsqueeze(1)).squeeze(1)

    def state(self) -> dict[str, Tensor]:
        """Returns the state for a checkpoint; `from_state` restores it bit for bit."""
        return self.estimator.state() | {"supervision.row": self.row}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Supervision:
        state = dict(state)
        row = state.pop("supervision.row")
        return cls._of(SDMEstimator.from_state(state), row)
