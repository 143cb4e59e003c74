"""The calibration report: the data, the fitted layer and its regions, and the held-out figures.

It is report.json in the bundle, plain JSON without infinities (an absent region has null thresholds).
The server reads two figures from it, by alpha: `reference_abstention_ratio`, the share of held-out prompts on which
the lower estimator would have abstained, and the same of the rule. An operator compares it with traffic to detect
drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from candor.calibration.base_rates import base_rate_report
from candor.calibration.certificate import Certification
from candor.calibration.evaluate import Evaluation
from candor.calibration.fit import FitSettings, Fitted
from candor.calibration.generate import Labelled, count_faults
from candor.calibration.intervals import CONFIDENCE, Share
from candor.calibration.rule_certificate import CertifiedRule
from candor.sdm.region import Region

SCHEMA_VERSION = 3


def build_report(
    fitted: Fitted,
    settings: FitSettings,
    fitting: Sequence[Labelled],
    held_out: Sequence[Labelled],
    evaluation: Evaluation,
    certification: Certification | None,
    rule: CertifiedRule | None,
) -> dict[str, Any]:
    """Builds report.json. fitting: the whole fitting part, including answers that could not be scored."""
    dropped = [answer for answer in fitting if answer.fault is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "counts": {
            "training_half": _counts(fitted.training),
            "calibration_half": _counts(fitted.calibration),
            "held_out": _counts(held_out),
            "dropped": {"by_fault": count_faults(dropped), "ids": sorted(answer.id for answer in dropped)},
        },
        "training": fitted.chosen.to_json(),
        "settings": settings.to_json(),
        "regions": {str(alpha): _region(region) for alpha, region in fitted.estimator.regions.items()},
        "interval_confidence": CONFIDENCE,
        "held_out": evaluation.to_json(),
        "base_rates": base_rate_report(evaluation),
        "certification": None if certification is None else certification.to_json(),
        "rule": None if rule is None else rule.to_json(),
        "reference_abstention_ratio": {
            str(alpha): 1 - reading.answered.hits / reading.answered.of
            for alpha, reading in evaluation.lower.items()
        },
        "reference_abstention_ratio_of_rule": {
            str(alpha): 1 - reading.answered.hits / reading.answered.of
            for alpha, reading in evaluation.rule.items()
        },
        # A comparison recovers the half from these (`candor.comparison.compare.halves`).
        "calibration_prompts": sorted({answer.prompt_digest for answer in fitted.calibration}),
        # A later evaluation recognises by these a prompt that the bundle was made from.
        "fitted_prompts": sorted(
            {answer.prompt_digest for answer in fitted.answers}
            | (certification.prompts if certification else set())
            | (rule.searches[0].prompts if rule else set())
        ),
    }


def _counts(answers: Sequence[Labelled]) -> dict[str, float]:
    ones = sum(answer.label for answer in answers)
    return {"records": len(answers), "correct": ones, "base_rate": ones / len(answers)}


def _region(region: Region) -> dict[str, Any]:
    found = isfinite(region.q_prime_min)
    return {
        "found": found,
        "rescaled_similarity_threshold": region.q_prime_min if found else None,
        "class_thresholds": region.psi.tolist() if found else None,
    }


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Evaluations by name as a text table: one line each for lower and plain at every alpha.

    Shares are in per cent, as value [low, high].
    """
    return "\n\n".join(
        "\n".join([_heading(name, evaluation), *_rule_rows(evaluation), *_rows(evaluation)])
        for name, evaluation in evaluations.items()
    )


def _heading(name: str, evaluation: Evaluation) -> str:
    faults = ", ".join(f"{count} {fault}" for fault, count in evaluation.faults.items())
    lines = [
        f"{name}: {evaluation.records} records" + (f", of which not scorable: {faults}" if faults else ""),
        f"  correct {_percent(evaluation.correct)}   verdict right {_percent(evaluation.verdict)}   "
        f"out of distribution {_percent(evaluation.ood)}",
    ]
    if evaluation.auroc is not None:
        value, low, high = evaluation.auroc
        lines.append(f"  AUROC of SDM(z')_1: {value:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def _rule_rows(evaluation: Evaluation) -> Iterable[str]:
    if not evaluation.rule:
        return
    titles = ("known", "answered", "right if answered", "answered of wrong", "answered of right")
    yield f"  {'two gates':<18}" + "".join(f"{title:<22}" for title in titles) + "tokens"
    for alpha, one in evaluation.rule.items():
        shares = (one.known, one.answered, one.accuracy_answered, *one.answered_of_class)
        yield (
            f"  alpha {alpha:<12}"
            + "".join(f"{_percent(share):<22}" for share in shares)
            + f"{one.tokens:.1f}"
        )
    if (found := evaluation.probabilities) is not None:
        area = "-" if found.auroc is None else f"{found.auroc:.3f}"
        rms, low, high = found.rms_error
        yield (
            f"  probability: calibration error {100 * found.calibration_error:.1f} % (by chance "
            f"{100 * found.by_chance:.1f}), without chance RMS {100 * rms:.1f} % "
            f"[{100 * low:.1f}, {100 * high:.1f}], Brier {found.brier:.3f}, AUROC {area}"
        )
    yield "  the papers' region alone:"


def _rows(evaluation: Evaluation) -> Iterable[str]:
    titles = ("admitted", "answered", "right if answered", "right if admitted", "given y=0", "given y=1")
    yield f"  {'alpha':<7}{'estimator':<11}" + "".join(f"{title:<22}" for title in titles) + "tokens"
    for alpha in evaluation.lower:
        for kind, readings in (("lower", evaluation.lower), ("plain", evaluation.plain)):
            reading = readings[alpha]
            shares = (
                reading.admitted,
                reading.answered,
                reading.accuracy_answered,
                reading.accuracy_admitted,
                *reading.class_accuracy,
            )
            cells = "".join(f"{_percent(share):<22}" for share in shares)
            yield f"  {alpha:<7}{kind:<11}{cells}{reading.tokens:.1f}"


def _percent(share: Share) -> str:
    if share.value is None or share.low is None or share.high is None:
        return "-"
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
