"""Verdicts are the estimator's own rows, alone and in a batch; failures have a cause."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from candor.app.answering.scoring import Judged, Scorer, ScoringFailed, ScoringRequest
from candor.engine.base import HiddenSummary
from candor.model_store.bundle import Bundle
from candor.sdm.estimator import Measurement, SDMEstimator

Hidden = Callable[[Any], HiddenSummary]


def judge(bundle: Bundle, *asked: ScoringRequest, kind: Any = "lower") -> list[Judged]:
    async def main() -> list[Judged]:
        scorer = Scorer(bundle, kind, 5.0)
        try:
            return await asyncio.gather(*map(scorer.judge, asked))
        finally:
            scorer.close()

    return asyncio.run(main())


def request(hidden: HiddenSummary | None, alpha: float = 0.9, exemplars: int = 0) -> ScoringRequest:
    return ScoringRequest(hidden, alpha, calibrated=True, exemplars=exemplars)


def test_figures_are_the_estimates_row(bundle: Bundle, hidden: Hidden) -> None:
    [judged] = judge(bundle, request(hidden("thin")))
    row = bundle.estimator.estimate(torch.full((1, 8), 1.0), 0.9)
    found = judged.verdict.figures
    assert found is not None
    assert (found.prediction, found.similarity) == (1, int(row.q))
    assert found.probability == float(row.sdm[0, 1])
    assert found.probability_lower == float(row.sdm_lower[0, 1])
    assert found.probability_upper == float(row.sdm_upper[0, 1])
    assert found.rescaled_similarity == float(row.q_prime)
    assert found.distance_quantile == float(row.d)
    assert found.effective_sample_size == row.effective_sample_size[0].tolist()
    # z' = (-s, s) with s = mean(h) / 2 = 0.5, so y_hat's stands 1 above the other's.
    assert found.magnitude == pytest.approx(1.0)
    assert judged.exemplars == ()


@pytest.mark.parametrize(
    ("state", "prediction", "plain", "lower"),
    [
        ("follows", 1, None, None),
        ("not_following", 0, "predicted_not_following", "predicted_not_following"),
        ("thin", 1, None, "below_class_threshold"),
        ("edge", 1, "below_similarity_threshold", "below_similarity_threshold"),
        ("far", 1, "out_of_distribution", "out_of_distribution"),
    ],
)
def test_states_of_the_script_mean_what_they_say(
    bundle: Bundle, hidden: Hidden, state: str, prediction: int, plain: str | None, lower: str | None
) -> None:
    for kind, reason in (("plain", plain), ("lower", lower)):
        [judged] = judge(bundle, request(hidden(state)), kind=kind)
        assert judged.verdict.reason == reason
        found = judged.verdict.figures
        assert found is not None
        assert found.prediction == prediction
        assert all(map(math.isfinite, (found.probability, found.rescaled_similarity, found.magnitude)))


def test_a_batch_of_alphas_gives_each_its_own(bundle: Bundle, hidden: Hidden) -> None:
    states = ("follows", "thin", "edge", "far")
    asked = [request(hidden(state), alpha, 2) for state in states for alpha in (0.9, 0.95)]
    alone = [judge(bundle, one, kind="plain")[0] for one in asked]
    assert judge(bundle, *asked, kind="plain") == alone
    assert alone[2].verdict.reason is None  # "thin" at 0.9 ...
    assert alone[3].verdict.reason == "below_class_threshold"  # ... and at 0.95


def test_each_of_a_batch_keeps_its_own_request(bundle: Bundle, hidden: Hidden) -> None:
    follows = request(hidden("follows"))
    uncalibrated, certified = replace(follows, calibrated=False), replace(follows, certified_only=True)
    found = judge(bundle, follows, uncalibrated, certified)
    reasons = [judged.verdict.reason for judged in found]
    assert reasons == [None, "uncalibrated_request", "not_certified"]
    assert [judged.verdict.calibrated for judged in found] == [True, False, True]


def test_exemplars_are_the_nearest_by_plain_distance(bundle: Bundle, hidden: Hidden) -> None:
    [found] = judge(bundle, request(hidden("edge"), exemplars=3))
    expected = (bundle.estimator.support.h_prime - 0.75).norm(dim=1).sort()  # h' = h
    assert [near.exemplar.id for near in found.exemplars] == [f"e{i}" for i in expected.indices[:3].tolist()]
    assert [near.distance for near in found.exemplars] == pytest.approx(expected.values[:3].tolist())


def test_exemplars_are_at_most_the_support(bundle: Bundle, hidden: Hidden) -> None:
    [whole] = judge(bundle, request(hidden("follows"), exemplars=10_000))
    assert len(whole.exemplars) == len(bundle.estimator.support)


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("missing", "not_captured"),
        ("incomplete", "incomplete"),
        ("nan", "non_finite"),
        ("huge", "non_finite"),
        ("wrong_size", "non_finite"),
    ],
)
def test_what_cannot_be_scored_has_a_cause(bundle: Bundle, hidden: Hidden, state: str, cause: str) -> None:
    with pytest.raises(ScoringFailed) as failed:
        judge(bundle, request(hidden(state), exemplars=2))
    assert failed.value.cause == cause


def test_an_unscorable_answer_does_not_spoil_the_others(bundle: Bundle, hidden: Hidden) -> None:
    async def main() -> list[Any]:
        scorer = Scorer(bundle, "lower", 5.0)
        states = ("follows", "wrong_size", "missing", "follows")
        asked = (scorer.judge(request(hidden(state))) for state in states)
        results = await asyncio.gather(*asked, return_exceptions=True)
        scorer.close()
        return results

    results = asyncio.run(main())
    assert [isinstance(result, Judged) for result in results] == [True, False, False, True]


class Slow(SDMEstimator):
    """Measures more slowly than anybody waits, or not at all."""

    def measure(self, h: torch.Tensor) -> Measurement:
        time.sleep(0.3)
        raise RuntimeError("too late, and broken")


@pytest.mark.parametrize(("timeout_s", "cause"), [(0.05, "timeout"), (5.0, "error")])
def test_slow_and_failing_scoring(bundle: Bundle, hidden: Hidden, timeout_s: float, cause: str) -> None:
    known = bundle.estimator
    slow = Slow(known.adaptor, known.support, known.ecdf, known.calibration, known.regions)

    async def main() -> None:
        scorer = Scorer(replace(bundle, estimator=slow), "lower", timeout_s)
        with pytest.raises(ScoringFailed) as failed:
            await scorer.judge(request(hidden("follows")))
        assert failed.value.cause == cause
        scorer.close()

    asyncio.run(main())
