"""Rebuilds estimators from recorded pieces, and compares with them those fitted from raw inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot

from benchmarks.conformance.doubt import d_in_doubt, q_range, strangers, y_in_doubt
from benchmarks.conformance.fixture import TOLERANCE, Fixture, Tally
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.conventions import RECORDED, Conventions
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import Region
from candor.sdm.support import Support


def adaptor_of(f: Fixture, prefix: str = "") -> ExemplarAdaptor:
    """The adaptor with recorded weights and scalars."""
    weight, head = f[f"{prefix}conv_weight"], f[f"{prefix}fc_weight"]
    mean, scale = (value.expand(weight.shape[1]) for value in f[f"{prefix}mean_std"])
    adaptor = ExemplarAdaptor(mean, scale, weight.shape[0], head.shape[0])
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(weight)
        adaptor.exemplar.bias.copy_(f[f"{prefix}conv_bias"])
        adaptor.head.weight.copy_(head)
        adaptor.head.bias.copy_(f[f"{prefix}fc_bias"])
    return adaptor


@dataclass(frozen=True, eq=False)
class Recorded:
    """The recorded pieces of one estimator, from which `sdm` must compute the recorded outputs."""

    conventions: Conventions
    alpha: float
    support: Support
    ecdf: ClasswiseECDF
    q_primes: ClasswiseECDF
    region: Region

    def shared_by(self, f: Fixture, t: Tally, fitted: SDMEstimator) -> tuple[bool, bool]:
        """Whether the estimator fitted from the raw inputs has the recorded eCDFs, and the recorded region.

        A calibration row in doubt may enter an eCDF or leave it, and move a threshold. Such a
        difference is accepted if there are rows in doubt; otherwise it is a mismatch.
        """
        seen = fitted.measure(f["x_cal"])
        low, high = q_range(seen.h_prime, seen.y_hat, fitted.support, self.conventions.max_q)
        may_move = (low == 0) & (high > 0) | y_in_doubt(seen.z_prime)
        moved = (fitted.ecdf.sizes() - self.ecdf.sizes()).abs()
        t.true("end to end: eCDF sizes", moved.sum().reshape(1) <= may_move.sum())
        own = one_hot(f["y_cal"], len(moved)) * (seen.q > 0).unsqueeze(1)
        doubtful = d_in_doubt(seen.d_nearest, fitted.ecdf, seen.h_prime, own) | (low != high)
        for c in range(len(moved)):
            lost = strangers(self.ecdf.of_class(c), fitted.ecdf.of_class(c))
            t.true(f"end to end: ecdf[{c}]", (lost <= may_move.sum()).reshape(1))
            if not moved.any():
                q_primes = fitted.calibration.q_prime_by_class
                lost = strangers(self.q_primes.of_class(c), q_primes.of_class(c))
                t.true(f"end to end: q_prime_sorted[{c}]", (lost <= doubtful.sum()).reshape(1))
        region = fitted.regions[self.alpha]
        same = region.found == self.region.found
        if same and region.found:
            off = torch.cat(
                [
                    region.psi - self.region.psi,
                    torch.tensor([region.q_prime_min / self.region.q_prime_min - 1]),
                ]
            )
            same = bool((off.abs() <= TOLERANCE).all())
        if "cal_q" in f:
            steady = not any(f[f"cal_sens_{kind}"].any() for kind in ("q", "d", "y", "hr"))
            t.true("end to end: region", torch.tensor([same or not steady]))
        return bool(moved.sum() == 0), same

    @classmethod
    def of(cls, f: Fixture) -> Recorded:
        alpha = float(f.settings["alpha"])
        return cls(
            replace(RECORDED, max_q=int(f.settings.get("max_q", 2048))),
            alpha,
            Support(f["train_h"], f["y_train"], f["train_y_hat"]),
            ClasswiseECDF.from_classes(f.ragged("ecdf_d_sq")),
            ClasswiseECDF.from_classes(f.ragged("q_prime_sorted")),
            Region(alpha, f.number("q_prime_min"), f["psi"]),
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """An estimator fitted from raw inputs, and whether its eCDFs and region equal the recorded ones."""

    estimator: SDMEstimator
    same_ecdf: bool
    same_region: bool
