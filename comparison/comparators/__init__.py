"""Other methods to decide which answers are reliable, on the same states, halves and alphas.

Each file holds one method. `COMPARATORS` lists them in the order of the reports. `SAMPLERS` need more passes of the
language model and are fitted and scored on fewer prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from candor.calibration.generate import Labelled
from candor.comparison.comparators import (
    abet,
    adue,
    ensemble,
    logistic,
    mahalanobis,
    no_reject,
    p_norm,
    prediction_sets,
    sdm_layer,
    semantic_entropy,
    softmax,
    temperature,
    two_gates,
    vbll_layer,
    verbalised,
)
from candor.comparison.comparators.base import Fit
from candor.comparison.comparators.passes import AskedAgain, FurtherQuestion
from candor.policy.conversation import Conversation
from candor.policy.policy import Policy

REFERENCE = "sdm_hr_lower"
"""The papers' region, which differences are taken to; every bundle has it."""


@dataclass(frozen=True)
class Comparator:
    title: str
    source: str
    fit: Fit


@dataclass(frozen=True)
class Sampler:
    """questions(conversation, answer, policy): further requests to the model. score(asked): higher means more
    confident that the answer is right; any range."""

    title: str
    source: str
    questions: Callable[[Conversation, Labelled, Policy], list[FurtherQuestion]]
    score: Callable[[AskedAgain], float]


COMPARATORS = {
    "no_reject": Comparator("No-reject", "the adaptor's verdict", no_reject.fit),
    "softmax": Comparator("Softmax", "1610.02136", softmax.fit),
    "temperature": Comparator("Temperature", "1706.04599", temperature.fit),
    "aps": Comparator("APS", "2006.02544", prediction_sets.fit_aps),
    "raps": Comparator("RAPS", "2009.14193", prediction_sets.fit_raps),
    "mahalanobis": Comparator("Mahalanobis", "1807.03888", mahalanobis.fit),
    "p_norm": Comparator("Max-logit p-norm", "2305.15508", p_norm.fit),
    "logistic": Comparator("Logistic", "scikit-learn", logistic.fit),
    "vbll": Comparator("VBLL", "2404.11599", vbll_layer.fit),
    "adue": Comparator("AdUE", "2505.15443", adue.fit),
    "abet": Comparator("AbeT", "2401.12129", abet.fit),
    "two_gates": Comparator("Two gates", "served", two_gates.fit),
    "sdm_alpha": Comparator("SDM alpha", "2509.12760", sdm_layer.fit_alpha),
    "sdm_hr": Comparator("SDM HR", "2509.12760", sdm_layer.fit_region),
    "sdm_hr_lower": Comparator("SDM HR lower", "2509.12760", sdm_layer.fit_region_lower),
    "ensemble": Comparator("Ensemble of J", "2509.12760, A.7", ensemble.fit),
}

SAMPLERS = {
    "semantic_entropy": Sampler(
        "Semantic entropy", "2302.09664", semantic_entropy.questions, semantic_entropy.score
    ),
    "verbalised": Sampler("Verbalised", "2305.14975", verbalised.questions, verbalised.score),
}
