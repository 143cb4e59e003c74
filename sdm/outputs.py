"""The results for scored rows, as tensors. Nothing is computed here but the calibration q' sorted by class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from candor.sdm.distance import ClasswiseECDF


@dataclass(frozen=True, eq=False)
class Calibration:
    """The scores of the calibration half and its true labels: sdm (n, C) and q_prime (n,) float32, labels (n,).

    Regions at any alpha come from it (`SDMEstimator.with_regions`).
    """

    sdm: Tensor
    q_prime: Tensor
    labels: Tensor

    @cached_property
    def q_prime_by_class(self) -> ClasswiseECDF:
        """All q' of each true class, ascending, q' = 0 included."""
        classes = range(self.sdm.shape[1])
        return ClasswiseECDF.from_classes([self.q_prime[self.labels == c] for c in classes])


@dataclass(frozen=True, eq=False)
class Measurement:
    """n rows compared with the support; nothing here depends on alpha.

    h_prime (n, M), z_prime (n, C) float32; y_hat, q, nearest (n,) int64; d_nearest (n,) float32,
    squared; finite (n,) bool.
    """

    h_prime: Tensor
    z_prime: Tensor
    y_hat: Tensor
    q: Tensor
    d_nearest: Tensor
    nearest: Tensor
    finite: Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """n rows judged at one alpha. Floats are float32, counts int64, flags bool.

    z_prime (n, C); y_hat (n,); q (n,) >= 0; d_nearest (n,) in [0, inf]; d (n,) in [0, 1]; sdm (n, C);
    q_prime (n,) in [0, q]; is_ood, admitted (n,); effective_sample_size (n, C); epsilon (n,);
    d_lower <= d <= d_upper (n,) in [0, 1]; sdm_lower, sdm_upper (n, C): the activation at those;
    q_prime_lower (n,); admitted_lower (n,): the sample-size-aware verdict.
    """

    z_prime: Tensor
    y_hat: Tensor
    q: Tensor
    d_nearest: Tensor
    d: Tensor
    sdm: Tensor
    q_prime: Tensor
    is_ood: Tensor
    admitted: Tensor
    effective_sample_size: Tensor
    epsilon: Tensor
    d_lower: Tensor
    d_upper: Tensor
    sdm_lower: Tensor
    sdm_upper: Tensor
    q_prime_lower: Tensor
    admitted_lower: Tensor
