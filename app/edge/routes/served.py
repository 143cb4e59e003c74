"""`GET /v1/reliability`: the bundle that judges the answers, for readers who want to check it."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.bundle import (
    BundleReport,
    CalibrationPoints,
    ShownCertificate,
    ShownRegion,
    ShownStanding,
    shown_shadow,
)
from candor.app.edge.services import InjectedServices
from candor.model_store.bundle import Bundle
from candor.policy.certificate import Certificate, RuleCertificate

router = APIRouter()

LARGEST_PLOT = 2000
"""Maximum calibration points returned; a screen cannot show more apart."""

_EXAMPLES = 3
_NOT_SHOWN = {"fitted_prompts"}


@router.get("/v1/reliability", responses={404: ERRORS[404]})
async def show_bundle(services: InjectedServices, model: str | None = None) -> BundleReport:
    """The bundle in use: how it was calibrated, what that measured, and its regions. model: else the first."""
    served = services.model(model)
    bundle, manifest = served.bundle, served.bundle.manifest
    watched: list[Certificate | RuleCertificate] = [
        *(manifest.rule.certificates if manifest.rule else ()),
        *manifest.certificates,
    ]
    standings = {one: served.standing(one) for one in watched}
    return BundleReport(
        name=manifest.name,
        bundle=bundle.digest,
        created=manifest.created,
        model=manifest.model.name,
        class_names=list(manifest.class_names),
        rule=served.rule,
        estimator=services.estimator,
        default_alpha=served.resolver.default_alpha,
        policy=asdict(manifest.policy),
        regions=_regions(bundle),
        certificates=[
            ShownCertificate.of(one, found.name if found else None) for one, found in standings.items()
        ],
        standings=[
            ShownStanding(
                rule=served.rule,
                alpha=one.alpha,
                standing=found.name,
                **{name: value for name, value in vars(found).items() if name != "name"},
            )
            for one, found in standings.items()
            if found is not None
        ],
        most_exemplars=served.resolver.most_exemplars,
        examples=_examples(bundle) if served.resolver.most_exemplars else [],
        takes_feedback=services.store is not None,
        shadow=shown_shadow(served.shadow),
        report={name: value for name, value in bundle.report.items() if name not in _NOT_SHOWN},
    )


@router.get("/v1/reliability/calibration", responses={404: ERRORS[404]})
async def show_calibration(services: InjectedServices, model: str | None = None) -> CalibrationPoints:
    """The calibration points in the plane of q' against SDM(z'), in which regions are drawn."""
    seen = services.model(model).bundle.estimator.calibration
    total = len(seen.labels)
    step = -(-total // LARGEST_PLOT) or 1
    probability, prediction = seen.sdm[::step].max(dim=1)  # (n,) each
    return CalibrationPoints(
        total=total,
        rescaled_similarity=[round(value, 3) for value in seen.q_prime[::step].tolist()],
        probability=[round(value, 8) for value in probability.tolist()],
        prediction=prediction.tolist(),
        label=seen.labels[::step].tolist(),
    )


def _regions(bundle: Bundle) -> list[ShownRegion]:
    return [
        ShownRegion(
            alpha=alpha,
            found=region.found,
            rescaled_similarity_threshold=region.q_prime_min if region.found else None,
            class_thresholds=region.psi.tolist() if region.found else None,
        )
        for alpha, region in sorted(bundle.estimator.regions.items())
    ]


def _examples(bundle: Bundle) -> list[str]:
    """Returns prompts of exemplars whose answer is right and is predicted to be."""
    right = (one.prompt for one in bundle.exemplars if one.label == one.prediction == 1)
    return [prompt for prompt, _ in zip(right, range(_EXAMPLES), strict=False)]
