"""The verdict as a table: every region, reason and order of precedence."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from candor.app.policy import Decision, Reading, decide, ended_as_calibrated, samples_as_calibrated
from candor.engine.base import Generation, Sampling
from candor.model_store.certificate import Certificate
from candor.model_store.manifest import Policy

ADMITTED = Reading(
    prediction=1,
    probability=0.99,
    probability_lower=0.98,
    probability_upper=0.995,
    similarity=100,
    rescaled_similarity=90.0,
    rescaled_similarity_lower=80.0,
    distance_quantile=0.9,
    magnitude=3.0,
    effective_sample_size=(50, 60),
    is_ood=False,
    admitted=True,
    admitted_lower=True,
    similarity_threshold=70.0,
)
REFUSED = replace(ADMITTED, admitted=False, admitted_lower=False)
HIGH = Decision("high", False, None)


@pytest.mark.parametrize("estimator", ["lower", "plain"])
@pytest.mark.parametrize(
    ("reading", "calibrated", "expected"),
    [
        (ADMITTED, True, HIGH),
        (replace(ADMITTED, prediction=0), True, Decision("high", True, "predicted_not_following")),
        (ADMITTED, False, Decision("low", True, "uncalibrated_request")),
        (replace(ADMITTED, is_ood=True), True, Decision("ood", True, "out_of_distribution")),
        (replace(ADMITTED, is_ood=True), False, Decision("ood", True, "out_of_distribution")),
        (
            replace(REFUSED, similarity_threshold=math.inf),
            True,
            Decision("low", True, "no_region_at_alpha"),
        ),
        (
            replace(REFUSED, similarity_threshold=90.5),
            True,
            Decision("low", True, "below_similarity_threshold"),
        ),
        (REFUSED, True, Decision("low", True, "below_class_threshold")),
        (replace(REFUSED, prediction=0), True, Decision("low", True, "below_class_threshold")),
        (REFUSED, False, Decision("low", True, "uncalibrated_request")),
        (None, True, Decision("unavailable", True, "scoring_unavailable")),
        (None, False, Decision("unavailable", True, "scoring_unavailable")),
    ],
)
def test_decision(reading: Reading | None, calibrated: bool, expected: Decision, estimator: str) -> None:
    assert decide(reading, calibrated=calibrated, estimator=estimator) == expected  # type: ignore[arg-type]


def test_the_estimator_in_force_admits() -> None:
    thin = replace(ADMITTED, admitted_lower=False)
    assert decide(thin, calibrated=True, estimator="plain") == HIGH
    assert decide(thin, calibrated=True, estimator="lower") == Decision("low", True, "below_class_threshold")


def test_the_reason_speaks_of_the_estimator_in_force() -> None:
    """q' = 90 and q'_lower = 80 stand on either side of the threshold 85."""
    between = replace(REFUSED, similarity_threshold=85.0)
    assert decide(between, calibrated=True, estimator="plain").reason == "below_class_threshold"
    assert decide(between, calibrated=True, estimator="lower").reason == "below_similarity_threshold"


def test_the_threshold_itself_is_enough() -> None:
    exact = replace(REFUSED, similarity_threshold=80.0)
    assert decide(exact, calibrated=True, estimator="lower").reason == "below_class_threshold"


@pytest.mark.parametrize("estimator", ["lower", "plain"])
def test_answers_only_what_is_checked_calibrated_admitted_and_predicted_to_follow(estimator: str) -> None:
    """Over every combination of flags: one way leads to an answer, and reason is null exactly then."""
    flags = [False, True]
    for ood, admitted, lower, calibrated in itertools.product(flags, repeat=4):
        for prediction in (0, 1):
            reading = replace(
                ADMITTED, is_ood=ood, admitted=admitted, admitted_lower=lower, prediction=prediction
            )
            decision = decide(reading, calibrated=calibrated, estimator=estimator)  # type: ignore[arg-type]
            in_force = lower if estimator == "lower" else admitted
            answers = in_force and calibrated and not ood and prediction == 1
            assert decision.abstained is not answers
            assert (decision.reason is None) is answers
            assert (decision.region == "high") is (in_force and calibrated and not ood)


CERTIFICATE = Certificate(0.9, "lower", 0.95, 0.95, 80.0, 400, 120, 119, 0.961)


@pytest.mark.parametrize("certified_only", [False, True])
def test_a_certificate_comes_with_what_it_covers(certified_only: bool) -> None:
    """q' is 90 and q'_lower is 80: the estimator in force says which is compared."""
    for estimator, least, covered in [
        ("lower", 80.0, True), ("lower", 80.5, False), ("plain", 80.5, True), ("plain", 90.5, False)
    ]:  # fmt: skip
        decision = decide(
            ADMITTED,
            calibrated=True,
            estimator=estimator,  # type: ignore[arg-type]
            certificate=replace(CERTIFICATE, rescaled_similarity_min=least),
            certified_only=certified_only,
        )
        assert decision.region == "high"
        assert (decision.certificate is not None) is covered
        assert decision.abstained is (certified_only and not covered)
        assert decision.reason == ("not_certified" if decision.abstained else None)
        assert decision.settles


def test_no_certificate_helps_what_is_not_answered() -> None:
    for reading, calibrated in [
        (None, True),
        (REFUSED, True),
        (ADMITTED, False),
        (replace(ADMITTED, is_ood=True), True),
        (replace(ADMITTED, prediction=0), True),
    ]:
        for certified_only in (False, True):
            decision = decide(
                reading,
                calibrated=calibrated,
                estimator="lower",
                certificate=CERTIFICATE,
                certified_only=certified_only,
            )
            assert decision == decide(reading, calibrated=calibrated, estimator="lower")
            assert (decision.abstained, decision.certificate, decision.settles) == (True, None, False)


def test_where_only_certified_answers_count_and_there_is_no_certificate_nothing_is_answered() -> None:
    decision = decide(ADMITTED, calibrated=True, estimator="lower", certified_only=True)
    assert decision == Decision("high", True, "not_certified")


GREEDY = Policy(temperature=0.0, top_p=1.0, top_k=0, max_tokens=16, system_prompt=None)
SAMPLED = Policy(temperature=0.7, top_p=0.9, top_k=40, max_tokens=16, system_prompt=None)


@pytest.mark.parametrize(
    ("policy", "sampling", "expected"),
    [
        (GREEDY, Sampling(), True),
        (GREEDY, Sampling(top_p=0.5, top_k=3, seed=7), True),
        (GREEDY, Sampling(max_tokens=5, stop=("x",), logprobs=3), True),
        (GREEDY, Sampling(temperature=0.01), False),
        (GREEDY, Sampling(frequency_penalty=0.1), False),
        (GREEDY, Sampling(presence_penalty=-0.1), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=40), True),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=3), True),
        (SAMPLED, Sampling(temperature=0.0, top_p=0.9, top_k=40), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=1.0, top_k=40), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=0), False),
    ],
)
def test_samples_as_calibrated(policy: Policy, sampling: Sampling, expected: bool) -> None:
    assert samples_as_calibrated(policy, sampling) is expected


@pytest.mark.parametrize(
    ("truncated", "tokens", "expected"), [(False, 16, True), (False, 17, False), (True, 3, False)]
)
def test_ended_as_calibrated(truncated: bool, tokens: int, expected: bool) -> None:
    generation = Generation("text", (), "stop", True, truncated, None, 5, tokens)
    assert ended_as_calibrated(GREEDY, generation) is expected
