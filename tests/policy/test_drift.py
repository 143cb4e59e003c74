"""Drift of prompts: ranks that are uniform whatever the reference, and the rate of false alarms."""

from __future__ import annotations

import numpy as np
import pytest

from candor.policy import drift as module
from candor.policy.drift import Drift


def p_of(x: float, reference: np.ndarray) -> float:
    return float((1 + (reference >= x).sum()) / (len(reference) + 1))


def watch(
    prompts: np.ndarray, references: int, seed: int, threshold: float | None = None
) -> tuple[int | None, Drift]:
    """The prompt, from 1, at which the evidence first reached the threshold (the module's, if None)."""
    reference = np.random.default_rng([seed, 1]).normal(size=references)
    one = Drift(references, seed)
    for number, x in enumerate(prompts, start=1):
        one.observe(p_of(x, reference))
        if one.evidence >= (one.threshold if threshold is None else threshold):
            return number, one
    return None, one


def test_prompts_as_the_references_make_no_alarm_however_small_the_reference() -> None:
    """Twenty references, whose own p-values would soon look like drift."""
    for seed in range(5):
        found, _ = watch(np.random.default_rng(seed).normal(size=4000), 20, seed)
        assert found is None


def test_false_alarms_come_no_more_often_than_stated() -> None:
    """R - n is a martingale: at A = 100, at least 100 prompts pass on average. 200 runs of at most 2,000."""
    waited = [
        watch(np.random.default_rng(seed).normal(size=2000), 50, seed, threshold=2.0)[0] or 2000
        for seed in range(200)
    ]
    assert np.mean(waited) - 3 * np.std(waited) / np.sqrt(200) >= 100


@pytest.mark.parametrize(("far", "within"), [(0.3, 60), (1.0, 20)])
def test_prompts_from_elsewhere_are_noticed(far: float, within: int) -> None:
    draw = np.random.default_rng(0)
    usual = draw.normal(size=1000)
    strange = np.where(draw.random(500) < far, 5.0, draw.normal(size=500))
    found, one = watch(np.concatenate([usual, strange]), 300, 0)
    assert found is not None
    assert 1000 < found <= 1000 + within
    assert one.alarm


def test_prompts_that_lie_nearer_are_noticed_too() -> None:
    """The same easy prompt again and again."""
    found, _ = watch(np.full(200, -2.5), 300, 0)
    assert found is not None


def test_the_ranks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two references, p = 1 / 3: farther out than both, 2 / 3: between them. With U = 1 the rank is the largest."""
    seen = []
    monkeypatch.setattr(module.np, "sqrt", lambda u: seen.append(u) or u**0.5)
    one = Drift(2, 0)
    one._random.random = lambda: 0.0  # type: ignore[method-assign]
    for p in (1 / 3, 2 / 3, 2 / 3, 1.0):
        one.observe(p)
    # of 3: itself; of 4: one before it, one reference, itself; of 5: likewise and its equal; of 6: all
    assert seen == pytest.approx([1 / 3, 3 / 4, 4 / 5, 6 / 6])
