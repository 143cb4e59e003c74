"""Distance: the rank of a point's nearest distance among those of calibration points, per true class.

    d_c = 1 - #{e in E_c : e < d_nearest} / |E_c|,        d = min over c,

where E_c holds d_nearest of the calibration points of true class c with q > 0, rightly predicted or
not (arXiv 2509.12760, section 3). Strict counts: d = 1 at distance 0, 1/|E_c| at the largest
calibration distance, 0 beyond it. Distances are squared L2, as in the public code; ranks are the
same as those of the papers' L2.

Decided here: a class without such points gives no information about distance and is left out of the
minimum (see `Conventions.empty_class`). No region is then found, since the class has no points above
any threshold. With no points at all, d = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.conventions import DEFAULT, Conventions


@dataclass(frozen=True, eq=False)
class ClasswiseECDF:
    """values: (sum |E_c|,) float32, ascending within a class; offsets: (C + 1,) int64 bounds of E_c."""

    values: Tensor
    offsets: Tensor

    @classmethod
    def fit(cls, d_nearest: Tensor, q: Tensor, labels: Tensor, num_classes: int) -> ClasswiseECDF:
        """d_nearest (n,) squared distances, q (n,), true labels (n,) in 0..C-1."""
        return cls.from_classes([d_nearest[(labels == c) & (q > 0)] for c in range(num_classes)])

    @classmethod
    def from_classes(cls, classes: Sequence[Tensor]) -> ClasswiseECDF:
        """One unsorted tensor of values a class."""
        sizes = torch.tensor([0, *map(len, classes)])
        return cls(
            torch.cat([values.float().sort().values for values in classes]),
            sizes.cumsum(0),
        )

    @property
    def num_classes(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def _classes(self) -> tuple[Tensor, ...]:
        return torch.split(self.values, self.sizes().tolist())

    def sizes(self) -> Tensor:
        """|E_c|: (C,) int64."""
        return self.offsets.diff()

    def of_class(self, c: int) -> Tensor:
        """E_c, ascending."""
        return self._classes[c]

    def count_below(self, query: Tensor) -> Tensor:
        """#{e in E_c : e < query}: (n,) -> (n, C) int64."""
        query = query.float().contiguous()
        return torch.stack(
            [torch.searchsorted(values, query, right=False) for values in self._classes], dim=1
        )

    def quantile(self, d_nearest: Tensor, conventions: Conventions = DEFAULT) -> Tensor:
        """d: (n,) squared distances in [0, inf] -> (n,) float32 in [0, 1]."""
        sizes = self.sizes()
        d = 1 - self.count_below(d_nearest).double() / sizes.clamp(min=1)  # (n, C)
        absent = 0.0 if conventions.empty_class == "zero" or not sizes.any() else 1.0
        return torch.where(sizes > 0, d, absent).amin(dim=1).float()
