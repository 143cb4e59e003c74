"""Readings are the estimator's own rows, alone and in a batch; failures have a cause."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from candor.app.answering.scoring import Score, Scorer, ScoringFailed, read
from candor.engine.base import HiddenSummary, Representation
from candor.sdm.estimator import Measurement, SDMEstimator

Hidden = Callable[[Any], HiddenSummary]


def score(estimator: SDMEstimator, *asked: tuple[HiddenSummary, float, int]) -> list[Score]:
    async def main() -> list[Score]:
        scorer = Scorer(estimator, Representation(), 5.0)
        try:
            return await asyncio.gather(*(scorer.score(*one) for one in asked))
        finally:
            scorer.close()

    return asyncio.run(main())


def test_reading_is_the_estimates_row(estimator: SDMEstimator, hidden: Hidden) -> None:
    [found] = score(estimator, (hidden("thin"), 0.9, 0))
    row = estimator.estimate(torch.full((1, 8), 1.0), 0.9)
    reading = found.reading
    assert (reading.prediction, reading.similarity) == (1, int(row.q))
    assert reading.probability == float(row.sdm[0, 1])
    assert reading.probability_lower == float(row.sdm_lower[0, 1])
    assert reading.probability_upper == float(row.sdm_upper[0, 1])
    assert reading.rescaled_similarity == float(row.q_prime)
    assert reading.rescaled_similarity_lower == float(row.q_prime_lower)
    assert reading.distance_quantile == float(row.d)
    assert reading.effective_sample_size == tuple(row.effective_sample_size[0].tolist())
    # z' = (-s, s) with s = mean(h) / 2 = 0.5, so y_hat's stands 1 above the other's.
    assert reading.magnitude == pytest.approx(1.0)
    assert reading.similarity_threshold == estimator.regions[0.9].q_prime_min
    assert found.neighbours == ()


@pytest.mark.parametrize(
    ("state", "prediction", "ood", "plain", "lower"),
    [
        ("follows", 1, False, True, True),
        ("not_following", 0, False, True, True),
        ("thin", 1, False, True, False),
        ("edge", 1, False, False, False),
        ("far", 1, True, False, False),
    ],
)
def test_states_of_the_script_mean_what_they_say(
    estimator: SDMEstimator, hidden: Hidden, state: str, prediction: int, ood: bool, plain: bool, lower: bool
) -> None:
    reading = score(estimator, (hidden(state), 0.9, 0))[0].reading
    assert (reading.prediction, reading.is_ood) == (prediction, ood)
    assert (reading.admitted, reading.admitted_lower) == (plain, lower)
    assert all(map(math.isfinite, (reading.probability, reading.rescaled_similarity, reading.magnitude)))


def test_a_batch_of_alphas_gives_each_its_own(estimator: SDMEstimator, hidden: Hidden) -> None:
    asked = [
        (hidden(state), alpha, 2) for state in ("follows", "thin", "edge", "far") for alpha in (0.9, 0.95)
    ]
    alone = [score(estimator, one)[0] for one in asked]
    assert score(estimator, *asked) == alone
    assert alone[2].reading.admitted is True  # "thin" at 0.9 ...
    assert alone[3].reading.admitted is False  # ... and at 0.95


def test_neighbours_are_the_nearest_by_plain_distance(estimator: SDMEstimator, hidden: Hidden) -> None:
    [found] = score(estimator, (hidden("edge"), 0.9, 3))
    distances = (estimator.support.h_prime - 0.75).norm(dim=1)  # h' = h
    expected = distances.sort()
    assert [near.row for near in found.neighbours] == expected.indices[:3].tolist()
    assert [near.distance for near in found.neighbours] == pytest.approx(expected.values[:3].tolist())


def test_neighbours_are_at_most_the_support(estimator: SDMEstimator, hidden: Hidden) -> None:
    [whole] = score(estimator, (hidden("follows"), 0.9, 10_000))
    assert len(whole.neighbours) == len(estimator.support)


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("missing", "not_captured"),
        ("incomplete", "incomplete"),
        ("nan", "non_finite"),
        ("huge", "non_finite"),
        ("wrong_size", "error"),
    ],
)
def test_what_cannot_be_scored_has_a_cause(
    estimator: SDMEstimator, hidden: Hidden, state: str, cause: str
) -> None:
    with pytest.raises(ScoringFailed) as failed:
        score(estimator, (hidden(state), 0.9, 0))
    assert failed.value.cause == cause


def test_an_unscorable_answer_does_not_spoil_the_others(estimator: SDMEstimator, hidden: Hidden) -> None:
    async def main() -> list[Any]:
        scorer = Scorer(estimator, Representation(), 5.0)
        states = ("follows", "wrong_size", "missing", "follows")
        results = await asyncio.gather(
            *(scorer.score(hidden(state), 0.9) for state in states), return_exceptions=True
        )
        scorer.close()
        return results

    results = asyncio.run(main())
    assert [isinstance(result, Score) for result in results] == [True, False, False, True]


class Slow(SDMEstimator):
    """Measures more slowly than anybody waits, or not at all."""

    def measure(self, h: torch.Tensor) -> Measurement:
        time.sleep(0.3)
        raise RuntimeError("too late, and broken")


@pytest.mark.parametrize(("timeout_s", "cause"), [(0.05, "timeout"), (5.0, "error")])
def test_slow_and_failing_scoring(
    estimator: SDMEstimator, hidden: Hidden, timeout_s: float, cause: str
) -> None:
    slow = Slow(
        estimator.adaptor, estimator.support, estimator.ecdf, estimator.calibration, estimator.regions
    )

    async def main() -> None:
        scorer = Scorer(slow, Representation(), timeout_s)
        with pytest.raises(ScoringFailed) as failed:
            await scorer.score(hidden("follows"), 0.9)
        assert failed.value.cause == cause
        scorer.close()

    asyncio.run(main())


def test_read_takes_the_asked_row(estimator: SDMEstimator) -> None:
    estimate = estimator.estimate(torch.tensor([[2.0] * 8, [-2.0] * 8]), 0.95)
    assert [read(estimate, row, 1.0).prediction for row in (0, 1)] == [1, 0]
