"""The SDM estimator: computes all reliability figures of a state h.

    h -> h', z', y_hat          adaptor
      -> q, d_nearest           comparison with the support       (costly: `measure`, free of alpha)
      -> d, SDM(z'), q'         distance quantile, activation, rescaled similarity
      -> region at alpha        admission, by the estimate and by its lower band   (cheap: `judge`)

(2509.12760, sections 3 and 4.) Every value of a row is a function of that row alone: scoring it
alone or in a batch makes no difference (sdm/arithmetic.py says how).

Decided here: a row that isn't finite (`FrozenAdaptor`) is out of distribution with q = d = 0,
d_nearest = inf, nearest = -1 and z' = 0; it is never admitted and no output holds a NaN. d = 0 is out
of distribution too (`Conventions.zero_d_is_ood`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from candor.sdm.activation import sdm
from candor.sdm.adaptor import ExemplarAdaptor, FrozenAdaptor
from candor.sdm.conventions import DEFAULT, Conventions
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.outputs import Calibration, Estimate, Measurement
from candor.sdm.region import Region, find_region, q_prime
from candor.sdm.sample_size import band, dkw_epsilon, effective_sample_size
from candor.sdm.similarity import neighbourhood
from candor.sdm.state import STATE_NAMES, flatten, restore
from candor.sdm.support import Support

__all__ = ["STATE_NAMES", "Calibration", "Estimate", "Measurement", "SDMEstimator"]

EMPTY_ECDF = ClasswiseECDF(torch.empty(0), torch.zeros(1, dtype=torch.int64))
EMPTY_CALIBRATION = Calibration(torch.empty(0, 0), torch.empty(0), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class SDMEstimator:
    """Frozen: the weights are read at first use, and a change to them afterwards has no effect.

    regions: by alpha; see `with_regions`.
    """

    adaptor: ExemplarAdaptor
    support: Support
    ecdf: ClasswiseECDF
    calibration: Calibration
    regions: Mapping[float, Region] = field(default_factory=dict)
    conventions: Conventions = DEFAULT

    @classmethod
    def fit(
        cls,
        adaptor: ExemplarAdaptor,
        train: tuple[Tensor, Tensor],
        calibration: tuple[Tensor, Tensor],
        alphas: Iterable[float] = (),
        conventions: Conventions = DEFAULT,
    ) -> SDMEstimator:
        """From a trained adaptor and two disjoint halves (h (n, D), labels (n,)): the first becomes the
        support, the second gives distances, thresholds and regions. Training rows that aren't
        finite can't be exemplars and raise ValueError.
        """
        (h_train, y_train), (h_cal, y_cal) = train, calibration
        num_classes = adaptor.num_classes
        if len(y_cal) and (int(y_cal.min()) < 0 or int(y_cal.max()) >= num_classes):
            found = sorted(set(y_cal.tolist()))
            raise ValueError(f"calibration labels must be in 0..{num_classes - 1}, got {found}")
        h_prime, _, y_hat, finite = FrozenAdaptor(adaptor)(h_train)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"training rows {bad[:10]} aren't finite; leave them out")
        support = Support(h_prime, y_train.long(), y_hat)
        bare = cls(adaptor, support, EMPTY_ECDF, EMPTY_CALIBRATION, {}, conventions)
        return bare.recalibrated(support, h_cal, y_cal, alphas)

    def recalibrated(
        self, support: Support, h: Tensor, labels: Tensor, alphas: Iterable[float]
    ) -> SDMEstimator:
        """The same adaptor over another support, with distances, scores and regions from rows (h (n, D), labels (n,)
        in 0..C-1) that are not in it."""
        bare = replace(self, support=support, ecdf=EMPTY_ECDF, calibration=EMPTY_CALIBRATION, regions={})
        seen = bare.measure(h)
        ecdf = ClasswiseECDF.fit(seen.d_nearest, seen.q, labels, self.adaptor.num_classes)
        _, scores, rescaled = replace(bare, ecdf=ecdf).activate(seen)
        fitted = replace(bare, ecdf=ecdf, calibration=Calibration(scores, rescaled, labels.long()))
        return fitted.with_regions(alphas)

    @cached_property
    def _projection(self) -> FrozenAdaptor:
        return FrozenAdaptor(self.adaptor)

    def measure(self, h: Tensor) -> Measurement:
        """h (n, D), any float dtype -> each row compared with the support."""
        if h.dim() != 2 or h.shape[1] != self.adaptor.input_dim:
            raise ValueError(f"h must be (n, {self.adaptor.input_dim}), got {tuple(h.shape)}")
        h_prime, z_prime, y_hat, finite = self._projection(h)
        near = neighbourhood(
            h_prime,
            y_hat,
            self.support,
            max_q=self.conventions.max_q,
            passed_over=self.conventions.passed_over,
        )
        return Measurement(
            h_prime,
            z_prime,
            y_hat,
            near.q.where(finite, 0),
            near.d_nearest.where(finite, torch.inf),
            near.nearest.where(finite, -1),
            finite,
        )

    def activate(self, seen: Measurement) -> tuple[Tensor, Tensor, Tensor]:
        """d (n,), SDM(z') (n, C), q' (n,): float32."""
        d = self.ecdf.quantile(seen.d_nearest, self.conventions)
        scores, rescaled = _activate(seen, d)
        return d, scores, rescaled

    def judge(self, seen: Measurement, alpha: float) -> Estimate:
        """The verdict at one of `regions`' alphas."""
        if alpha not in self.regions:
            raise ValueError(f"no region at alpha = {alpha}; this estimator has {sorted(self.regions)}")
        region = self.regions[alpha]
        d, scores, rescaled = self.activate(seen)
        is_ood = rescaled < 1  # floor(q') = 0, also where a row isn't finite
        if self.conventions.zero_d_is_ood:
            is_ood |= d <= 0
        n_effective = effective_sample_size(rescaled, self.calibration.q_prime_by_class)
        epsilon = dkw_epsilon(n_effective, alpha).amax(dim=1)
        d_lower, d_upper = band(d, epsilon)
        sdm_lower, q_prime_lower = _activate(seen, d_lower)
        sdm_upper = sdm(seen.z_prime, seen.q, d_upper)
        return Estimate(
            z_prime=seen.z_prime,
            y_hat=seen.y_hat,
            q=seen.q,
            d_nearest=seen.d_nearest,
            d=d,
            sdm=scores,
            q_prime=rescaled,
            is_ood=is_ood,
            admitted=region.admit(scores, seen.y_hat, rescaled, is_ood),
            effective_sample_size=n_effective,
            epsilon=epsilon.float(),
            d_lower=d_lower,
            d_upper=d_upper,
            sdm_lower=sdm_lower,
            sdm_upper=sdm_upper,
            q_prime_lower=q_prime_lower,
            admitted_lower=region.admit(sdm_lower, seen.y_hat, q_prime_lower, is_ood),
        )

    def estimate(self, h: Tensor, alpha: float) -> Estimate:
        """`judge` of `measure`: h (n, D)."""
        return self.judge(self.measure(h), alpha)

    def nearest(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest exemplars: squared distances (n, k) ascending, support rows (n, k).

        A row that isn't finite has none: distances inf, rows -1.
        """
        h_prime, _, _, finite = self._projection(h)
        distances, indices = self.support.nearest(h_prime, k)
        known = finite.unsqueeze(1)
        return distances.where(known, torch.inf), indices.where(known, -1)

    def with_regions(self, alphas: Iterable[float]) -> SDMEstimator:
        """The same estimator with regions at exactly these alphas, from the stored calibration scores."""
        seen = self.calibration
        regions = {
            alpha: find_region(seen.sdm, seen.q_prime, seen.labels, alpha, self.conventions)
            for alpha in alphas
        }
        return replace(self, regions=MappingProxyType(regions))

    def updated(self, labels: Tensor, predictions: Tensor, h_prime: Tensor) -> SDMEstimator:
        """With rows appended to the support; weights, distances, thresholds stay (2509.12760, A.6).

        Labels -1 (unlabelled) and -99 (out of distribution) are never valid, so they end q runs.
        """
        return replace(self, support=self.support.updated(h_prime, labels, predictions))

    def state(self) -> dict[str, Tensor]:
        """Everything but the conventions as flat tensors; `from_state` restores it to the bit."""
        return flatten(self.adaptor, self.support, self.ecdf, self.calibration, self.regions)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], conventions: Conventions = DEFAULT) -> SDMEstimator:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors."""
        return cls(*restore(state), conventions)


def _activate(seen: Measurement, d: Tensor) -> tuple[Tensor, Tensor]:
    """SDM(z') (n, C) at distance quantile d (n,), and q' (n,) from it."""
    scores = sdm(seen.z_prime, seen.q, d)
    return scores, q_prime(seen.q, scores.gather(1, seen.y_hat.unsqueeze(1)).squeeze(1))
