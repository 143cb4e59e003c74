"""Judges measured rows at one alpha and keeps estimate, decision and verdicts of the same rows together.

The server, calibration and the Python API all judge here, so that a region, its certificate and the rows that they
apply to cannot be mixed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from candor.policy.certificate import Certificate, EstimatorKind
from candor.policy.decision import Decisions, Verdict, decide, verdict_of
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Estimate, Measurement


@dataclass(frozen=True, eq=False)
class Judgement:
    """n rows judged at alpha. calibrated (n,) bool: whether request and answer kept to the policy.

    certificate: of the region under the estimator that judged; None if nothing was certified.
    """

    alpha: float
    estimate: Estimate
    decisions: Decisions
    calibrated: Tensor
    certificate: Certificate | None

    def verdict(self, row: int) -> Verdict:
        """Returns the verdict on one row, counted from 0."""
        return verdict_of(row, self.estimate, self.decisions, self.alpha, self.calibrated, self.certificate)


def judge(
    estimator: SDMEstimator,
    seen: Measurement,
    alpha: float,
    kind: EstimatorKind,
    *,
    calibrated: Tensor,
    certificates: Sequence[Certificate] = (),
    certified_only: Tensor | None = None,
) -> Judgement:
    """Judges a measurement by `estimator` at one of its alphas.

    calibrated, certified_only: (n,) bool, as `decide` takes them. certificates: the bundle's; the one of this region
    under `kind` is used. Raises ValueError for an alpha without a region.
    """
    estimate = estimator.judge(seen, alpha)
    certificate = certificate_at(certificates, alpha, kind)
    decisions = decide(
        estimate,
        estimator.regions[alpha],
        finite=seen.finite,
        calibrated=calibrated,
        estimator=kind,
        certificate=certificate,
        certified_only=certified_only,
    )
    return Judgement(alpha, estimate, decisions, calibrated, certificate)


def certificate_at(
    certificates: Sequence[Certificate], alpha: float, kind: EstimatorKind
) -> Certificate | None:
    """Returns the certificate of the region at alpha under that estimator; None if there is none."""
    return next((one for one in certificates if (one.alpha, one.estimator) == (alpha, kind)), None)
