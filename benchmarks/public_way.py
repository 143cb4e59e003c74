"""The public implementation's way to compare points with the support, written anew as a reference for timing ours.

    a flat index of squared L2 distances, its top k = min(2048, N) rows for every point;
    q = the leading run of valid rows among them, by a cumulative product over the n x k matches.

Its behaviour is known from recordings (docs/notation.md lists where we differ). Its additional bookkeeping (lists
rebuilt into tensors, files written at every best epoch, printed metrics) is left out, in its favour.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import torch
from torch import Tensor

CAP = 2048


@dataclass(frozen=True, eq=False)
class FlatSupport:
    """index: over the exemplars h' (N, M); labels, predictions: (N,) int64."""

    index: faiss.IndexFlatL2
    labels: Tensor
    predictions: Tensor

    @classmethod
    def build(cls, h_prime: Tensor, labels: Tensor, predictions: Tensor) -> FlatSupport:
        index = faiss.IndexFlatL2(h_prime.shape[1])
        index.add(h_prime.numpy())
        return cls(index, labels, predictions)

    def compare(self, h_prime: Tensor, y_hat: Tensor, *, own_rows: bool = False) -> tuple[Tensor, Tensor]:
        """q (n,) int64 and d_nearest (n,) float32 of points h' (n, M) with predictions (n,).

        own_rows: the points are the support's rows, so the first match of each is dropped.
        """
        found, rows = self.index.search(h_prime.numpy(), min(CAP, len(self.labels)))
        first = int(own_rows)
        distances, nearest = torch.from_numpy(found)[:, first:], torch.from_numpy(rows)[:, first:]
        predictions = self.predictions[nearest]  # (n, k)
        valid = (self.labels[nearest] == predictions) & (predictions == y_hat.unsqueeze(1))
        return valid.float().cumprod(dim=1).sum(dim=1).long(), distances[:, 0].clamp(min=0)
