"""A verdict in a sentence, for people: which gate or threshold withheld the answer, or what was certified of it."""

from __future__ import annotations

from candor.policy.certificate import Certificate, RuleCertificate
from candor.policy.decision import Verdict


def explanation(verdict: Verdict) -> str:
    """Returns one sentence on why the answer may be relied on, or why not."""
    asked, rule, figures = f"{100 * verdict.alpha:.10g}%", verdict.rule, verdict.figures
    match verdict.reason:
        case None if rule is not None:
            return f"The prompt is of the kind calibrated on, and {_score(verdict)}.{_certified(verdict.certificate)}"
        case None:
            return f"It lies in the region calibrated for {asked} accuracy.{_certified(verdict.certificate)}"
        case "scoring_unavailable":
            return "It could not be checked, so nothing is known of it."
        case "out_of_distribution" if rule is not None and rule.like_strangers:
            return "The prompt is like those that were declared strange."
        case "out_of_distribution" if rule is not None:
            return (
                "The prompt is unlike those calibrated on: a share of "
                f"{rule.prompt_p_value:.1%} of them lies as far out."
            )
        case "out_of_distribution":
            return "It is unlike every answer that was calibrated on."
        case "uncalibrated_request":
            return "It was asked for, or ended, in a way that was not calibrated."
        case "no_certificate_at_alpha":
            return f"Calibration could not certify {asked} accuracy for any answers."
        case "unpromising_prompt":
            return (
                "The prompt is of the kind calibrated on, but hardly any answer to it would be rated reliable "
                f"enough for {asked} accuracy."
            )
        case "below_score_threshold":
            return f"The prompt is of the kind calibrated on, but {_score(verdict)}."
        case "certificate_suspended":
            return f"Audits no longer bear out what was certified at {asked} accuracy, so it is withheld."
        case "no_region_at_alpha":
            return f"Calibration found no region of {asked} accuracy."
        case "below_similarity_threshold":
            similar = "" if figures is None else f", with q' = {figures.rescaled_similarity:.1f}"
            return f"Too little that was calibrated on is like it for {asked} accuracy{similar}."
        case "below_class_threshold":
            return f"Its probability is too low for {asked} accuracy."
        case "predicted_not_following":
            return f"It does not follow its instruction, judged with {asked} accuracy."
        case "not_certified":
            return f"It lies in the region calibrated for {asked} accuracy, but no certificate covers it."


def _score(verdict: Verdict) -> str:
    rule = verdict.rule
    if rule is None or rule.score is None or rule.score_min is None:
        return "its score is not known"
    reaches = "reaches" if verdict.reason is None else "is below"
    return f"the answer's score {rule.score:.2f} {reaches} {rule.score_min:.2f}"


def _certified(certificate: Certificate | RuleCertificate | None) -> str:
    if certificate is None:
        return ""
    return (
        f" Of such answers at least {100 * certificate.accuracy:.10g}% are right, certified with confidence "
        f"{100 * certificate.confidence:.10g}%."
    )
