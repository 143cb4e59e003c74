"""Sums whose value does not depend on the batch, the thread count or the instruction set.

A calibration row that is scored again must get the same distance, to the last bit: a distance one
rounding above its own entry moves d by 1/n_c and can change a verdict. BLAS does not guarantee this,
since its order of summation follows the shape of the call. Two remedies here do not depend on order:

* `RoundedLinear` returns the *correctly rounded* value of an affine map,

      y = fl32(fl64(W x + b)),   W x + b taken over the reals.

  A float64 product gives v with a rigorous error bound (Cauchy-Schwarz over the classical bound,
  Higham, Accuracy and Stability, eq. 3.5)

      delta = 1.01 (D + 2) 2^-53 (|w| |x| + |b|).

  Rounding is monotone, so where fl32(v - delta) = fl32(v + delta) the answer is known. The few
  entries where it is not (about one in 10^3) are summed exactly: products of two float32 are exact
  in float64, and `math.fsum` rounds their sum once.

* `pair_distances` and `squared_lengths` sum float64 squares by halving. They use only elementwise operations, which
  IEEE 754 defines to the bit, and their order depends on the width only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_32 = 2.0**-24
UNIT_64 = 2.0**-53
LARGEST = 1e12
"""Entries of h' beyond this are treated as not finite: their products would leave float32."""


class RoundedLinear:
    """x (n, D) float32 -> W x + b (n, M) float32, correctly rounded. Holds W, b as of construction."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight.detach().double()  # (M, D)
        self.bias = bias.detach().double()  # (M,)
        factor = 1.01 * (self.weight.shape[1] + 2) * UNIT_64
        self._of_length = factor * self.weight.norm(dim=1)  # (M,)
        self._of_bias = factor * self.bias.abs()  # (M,)

    def __call__(self, x: Tensor) -> Tensor:
        """Rows must be finite. A value beyond float32 comes back as an infinity."""
        x = x.double()
        v = torch.addmm(self.bias, x, self.weight.T)  # (n, M)
        lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        delta = torch.addcmul(self._of_bias, lengths, self._of_length)
        below, above = (v - delta).float(), (v + delta).float()
        for row, unit in (below != above).nonzero().tolist():
            terms = (x[row] * self.weight[unit]).tolist()
            below[row, unit] = math.fsum([*terms, float(self.bias[unit])])
        return below


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared L2 distances of paired rows: a, b (r, M) float32 -> (r,) float64.

    Equal rows are at exactly 0, and the value is a function of the two rows alone.
    """
    return _sum_halves((a.double() - b.double()).square_())


def squared_lengths(rows: Tensor) -> Tensor:
    """Squared L2 lengths of rows (r, M): (r,) float64, each a function of its row alone."""
    return _sum_halves(rows.double().square())


def _sum_halves(terms: Tensor) -> Tensor:
    """Sums of rows (r, M) float64, each in the order of its halves: (r,). M = 0: zeros."""
    # NumPy adds the same numbers; its calls cost a fifth of PyTorch's, and most rows come alone. Terms by column, so
    # that no sum overlaps what it is stored in.
    left = terms.T.contiguous().numpy()
    while (width := len(left)) > 1:
        half = (width + 1) // 2
        left[: width - half] += left[half:]
        left = left[:half]
    return torch.from_numpy(left[0])
