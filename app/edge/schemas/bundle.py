"""Schemas of the served bundle: its report, its regions and its calibration points."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from candor.app.answering.shadow import DECISIONS, SHADOW_DECISIONS, Shadow
from candor.policy.certificate import Certificate, RuleCertificate, RuleKind
from candor.policy.monitor import StandingName


class ShownRegion(BaseModel):
    """Algorithm 1's thresholds at alpha; null where no region was found.

    rescaled_similarity_threshold: q'_min. class_thresholds: psi_c, one per class.
    """

    alpha: float
    found: bool
    rescaled_similarity_threshold: float | None
    class_thresholds: list[float] | None


class ShownCertificate(BaseModel):
    """P(right | answered) >= accuracy, with this confidence.

    Of the two gates (rule `two-gates`) from score_min on (prompts: from forecast_min on), or of the region at alpha
    under the estimator from q' = rescaled_similarity_min on; what does not apply is null. Of `records` prompts set
    aside for it, `answered` were answered there, `right` of them rightly; of all of them `base_right` were.
    standing: after the audits so far; null where none watch it.
    """

    rule: RuleKind
    alpha: float
    estimator: Literal["lower", "plain"] | None = None
    accuracy: float
    confidence: float
    score_min: float | None = None
    forecast_min: float | None = None
    rescaled_similarity_min: float | None = None
    records: int
    answered: int
    right: int
    base_right: int | None = None
    lower_bound: float
    standing: StandingName | None = None

    @classmethod
    def of(
        cls, certificate: Certificate | RuleCertificate, standing: StandingName | None = None
    ) -> ShownCertificate:
        rule: RuleKind = "two-gates" if isinstance(certificate, RuleCertificate) else "sdm"
        return cls(rule=rule, standing=standing, **vars(certificate))


class ShownStanding(BaseModel):
    """How a certificate that judges here stands after audits of its answers.

    alarm, renewal: log10 of the evidence against it, and for it anew; threshold: at which either is shown. right,
    wrong: audits with that label; open: without one. since: number of the audit, from 1, that changed the standing
    last; 0 if none did.
    """

    rule: RuleKind
    alpha: float
    standing: StandingName
    alarm: float
    renewal: float
    threshold: float
    right: int
    wrong: int
    open: int
    since: int


class ShownShadow(BaseModel):
    """A bundle that scores each answer too. decisions: how many answers by the decision on them, then by its own.

    dropped: answers that it did not score, for too many waited.
    """

    bundle: str
    decisions: dict[Literal["answered", "abstained"], dict[Literal["answered", "abstained", "unknown"], int]]
    dropped: int


class BundleReport(BaseModel):
    """rule: what judges here. certificates: of both rules, as far as there are any. standings: of those that judge
    here, where the server has a store of audits.

    report: as calibration wrote it, without the digests of the prompts it was fitted on.

    most_exemplars: how many a request may ask to see. examples: prompts of exemplars, none where those are
    kept private. takes_feedback: whether labels for answers are kept. shadow: a second bundle that scores too.
    """

    object: Literal["reliability.bundle"] = "reliability.bundle"
    name: str
    bundle: str
    created: str
    model: str
    class_names: list[str]
    rule: RuleKind
    estimator: Literal["lower", "plain"]
    default_alpha: float
    policy: dict[str, Any]
    regions: list[ShownRegion]
    certificates: list[ShownCertificate]
    standings: list[ShownStanding]
    most_exemplars: int
    examples: list[str]
    takes_feedback: bool
    shadow: ShownShadow | None
    report: dict[str, Any]


class CalibrationPoints(BaseModel):
    """Columns, one entry a point: where calibration answers lie, and their true labels.

    total: how many there are; beyond `LARGEST_PLOT` every k-th is given.
    rescaled_similarity: q' >= 0. probability: SDM(z') of the prediction, in [1/C, 1].
    """

    object: Literal["reliability.calibration"] = "reliability.calibration"
    total: int
    rescaled_similarity: list[float]
    probability: list[float]
    prediction: list[int]
    label: list[int]


def shown_shadow(shadow: Shadow | None) -> ShownShadow | None:
    if shadow is None:
        return None
    decisions = {old: {new: shadow.matrix[old, new] for new in SHADOW_DECISIONS} for old in DECISIONS}
    return ShownShadow(bundle=shadow.bundle.digest, decisions=decisions, dropped=shadow.dropped)
