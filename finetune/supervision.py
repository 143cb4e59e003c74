"""The SDM layer that supervises an epoch, and what it says of a document (arXiv 2510.26183, section 4).

At its start an epoch trains a layer on the documents' states under the model as it is: random halves, each
document shown right or wrong. Held fixed, it gives every document of the epoch the base of its loss,

    beta = 2 + SDM(z')_r,      r = 1 for a right answer, 0 for a wrong one.

Its own documents are compared without themselves, left out by index, and ranked among distances of
training documents; the others as any new point is.
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
    """own_ecdf: distances among the support's own documents. row: (n,) support row of each document, -1 where
    it is not in the support."""

    estimator: SDMEstimator
    own_ecdf: ClasswiseECDF
    row: Tensor

    @classmethod
    def train(cls, h: Tensor, y: Tensor, settings: LayerSettings, seed: int) -> Supervision:
        """h: (n, 2H) of all documents, y: (n,) shown right or wrong. Raises ValueError as `train_layer` does."""
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
        """SDM(z')_r: h (b, 2H) now, documents (b,) their numbers, r (b,) in {0, 1} -> (b,) in [0, 1]."""
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
        """For a checkpoint; `from_state` restores it to the bit."""
        return self.estimator.state() | {"supervision.row": self.row}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Supervision:
        state = dict(state)
        row = state.pop("supervision.row")
        return cls._of(SDMEstimator.from_state(state), row)
