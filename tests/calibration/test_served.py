"""The policy run on answers that are there: which attempt is served, what it cost, and what that does to a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from candor.calibration.generate import Labelled
from candor.calibration.served import Attempts, regions_of_policy
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import find_region

RIGHT, WRONG, UNSURE = 2.1, -2.1, 0.01
"""Points of the line that are answered, recognised as wrong, and not admitted."""


@pytest.fixture(scope="module")
def estimator() -> SDMEstimator:
    """h in R: y = 1 right of 0, 0 left of it; the adaptor is h' = h, z' = (-h, h)."""
    adaptor = ExemplarAdaptor(torch.zeros(1), torch.ones(1), 1, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(torch.ones(1, 1))
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        adaptor.head.bias.zero_()
    train, calibration = torch.linspace(-3, 3, 400)[:, None], torch.linspace(-2.9, 2.9, 300)[:, None]
    halves = [(h, (h[:, 0] > 0).long()) for h in (train, calibration)]
    return SDMEstimator.fit(adaptor, halves[0], halves[1], (0.9,))


def prompt(name: str, points: Sequence[float], labels: Sequence[int], tokens: Sequence[int]) -> Labelled:
    """One prompt with an attempt at each point."""
    first, *more = (
        Labelled(name, name, (), f"{point}", 1 if label else 0, torch.tensor([point]), tokens=count)
        for point, label, count in zip(points, labels, tokens, strict=True)
    )
    return replace(first, more=tuple(more))


def test_the_first_reliable_attempt_is_served_else_the_last(estimator: SDMEstimator) -> None:
    answers = [
        prompt("at once", [RIGHT, RIGHT, RIGHT], [1, 0, 0], [5, 7, 9]),
        prompt("second", [UNSURE, RIGHT, RIGHT], [0, 1, 0], [5, 7, 9]),
        prompt("recognised as wrong is tried again", [WRONG, UNSURE, RIGHT], [0, 0, 1], [5, 7, 9]),
        prompt("never", [UNSURE, RIGHT * 0, WRONG], [1, 1, 0], [5, 7, 9]),
    ]
    attempts = Attempts.measure(estimator, answers)
    for kind in ("lower", "plain"):
        found = attempts.served(estimator, 0.9, kind)  # type: ignore[arg-type]
        assert found.attempts.tolist() == [1, 2, 3, 3]
        assert found.tokens.tolist() == [5, 12, 21, 21]
        assert found.y.tolist() == [1, 1, 1, 0]
        assert found.answered.tolist() == [True, True, True, False]
        assert found.y_hat.tolist() == [1, 1, 1, 0]
    assert found.admitted.tolist() == [True] * 4  # the last one: admitted, as wrong


def test_with_one_attempt_it_is_the_estimators_own_verdict(estimator: SDMEstimator) -> None:
    points = torch.linspace(-2.8, 2.8, 101)
    answers = [prompt(str(i), [float(h)], [int(h > 0)], [1]) for i, h in enumerate(points)]
    attempts = Attempts.measure(estimator, answers)
    estimate = estimator.estimate(points[:, None], 0.9)
    lower, plain = (attempts.served(estimator, 0.9, kind) for kind in ("lower", "plain"))  # type: ignore[arg-type]
    assert lower.admitted.equal(estimate.admitted_lower)
    assert plain.admitted.equal(estimate.admitted)
    assert lower.q_prime.equal(estimate.q_prime_lower)
    assert plain.q_prime.equal(estimate.q_prime)


def test_with_one_attempt_the_regions_stay(estimator: SDMEstimator) -> None:
    calibration = [prompt(f"{h}", [float(h)], [int(h > 0)], [1]) for h in torch.linspace(-2.9, 2.9, 300)]
    regions = regions_of_policy(estimator, Attempts.measure(estimator, calibration))
    assert regions[0.9] is estimator.regions[0.9]


def test_what_cannot_be_scored_is_tried_again_and_never_served_as_reliable(estimator: SDMEstimator) -> None:
    cut = prompt("cut", [RIGHT, RIGHT], [1, 1], [3, 4])
    broken = replace(cut, fault="truncated", h=torch.empty(0))
    never = replace(broken, more=(replace(broken, more=()),))
    found = Attempts.measure(estimator, [broken, never]).served(estimator, 0.9, "plain")
    assert found.attempts.tolist() == [2, 2]
    assert found.answered.tolist() == [True, False]
    assert found.q_prime[1] == 0


def test_fewer_attempts_are_the_first_of_them(estimator: SDMEstimator) -> None:
    answers = [
        prompt("a", [UNSURE, RIGHT, WRONG], [0, 1, 0], [1, 2, 4]),
        prompt("b", [WRONG] * 3, [0] * 3, [1] * 3),
    ]
    attempts = Attempts.measure(estimator, answers)
    for k, expected in ((1, [False, False]), (2, [True, False]), (3, [True, False])):
        fewer = attempts.first(k).served(estimator, 0.9, "plain")
        direct = [replace(answer, more=answer.more[: k - 1]) for answer in answers]
        again = Attempts.measure(estimator, direct).served(estimator, 0.9, "plain")
        assert fewer.answered.tolist() == again.answered.tolist() == expected
        assert fewer.tokens.tolist() == again.tokens.tolist()


def test_unequal_numbers_of_attempts_are_refused(estimator: SDMEstimator) -> None:
    answers = [prompt("a", [RIGHT], [1], [1]), prompt("b", [RIGHT, RIGHT], [1, 1], [1, 1])]
    with pytest.raises(ValueError, match=r"same number of attempts, got \[1, 2\]"):
        Attempts.measure(estimator, answers)


def test_winners_that_only_look_right_tighten_the_region_until_algorithm_1_accepts_what_is_served(
    estimator: SDMEstimator,
) -> None:
    """Wrong prompts whose second attempt lies, less and less deeply, among the right ones."""
    right = [
        prompt(f"r{i}", [float(h)] * 2, [1, 1], [1, 1]) for i, h in enumerate(torch.linspace(0.1, 2.9, 150))
    ]
    wrong = [
        prompt(f"w{i}", [float(-h)] * 2, [0, 0], [1, 1]) for i, h in enumerate(torch.linspace(0.1, 2.9, 150))
    ]
    lucky = [
        prompt(f"l{i}", [UNSURE, float(h)], [0, 0], [1, 1])
        for i, h in enumerate(torch.linspace(0.2, 1.5, 60))
    ]
    before = estimator.regions[0.9]
    honest = regions_of_policy(estimator, Attempts.measure(estimator, right + wrong))[0.9]
    attempts = Attempts.measure(estimator, right + wrong + lucky)
    after = regions_of_policy(estimator, attempts)[0.9]
    assert honest.found
    assert after.q_prime_min > honest.q_prime_min >= before.q_prime_min
    assert (after.psi >= before.psi).all()
    if after.found:
        tight = replace(estimator, regions={0.9: after})
        answered = attempts.served(tight, 0.9, "plain")
        loose = attempts.served(estimator, 0.9, "plain")
        accuracy = [float(s.y[s.answered].double().mean()) for s in (loose, answered)]
        assert accuracy[0] < accuracy[1]
        assert regions_of_policy(tight, attempts)[0.9] is after  # settled


def test_a_stricter_threshold_is_the_one_that_algorithm_1_finds_over_what_is_served(
    estimator: SDMEstimator,
) -> None:
    """One class's psi rises, the other's is high enough and stays."""
    h = [float(one) for one in torch.linspace(0.1, 2.9, 150)]
    right = [prompt(f"r{one}", [one] * 2, [1, 1], [1, 1]) for one in h]
    wrong = [prompt(f"w{one}", [-one] * 2, [0, 0], [1, 1]) for one in h]
    lucky = [prompt(f"l{one}", [UNSURE, one], [0, 0], [1, 1]) for one in h[5:75]]
    attempts = Attempts.measure(estimator, right + wrong + lucky)
    region = replace(estimator.regions[0.9], psi=torch.tensor([0.9, 0.99999]))
    given = replace(estimator, regions={0.9: region})
    first = attempts.served(given, 0.9, "plain")
    inside = first.q_prime >= region.q_prime_min
    found = find_region(first.sdm[inside], first.q_prime[inside], first.y[inside], 0.9)
    settled = regions_of_policy(given, attempts)[0.9]
    assert settled.q_prime_min == found.q_prime_min > region.q_prime_min
    assert settled.psi.tolist() == [float(found.psi[0]), float(region.psi[1])]
    assert found.psi[0] > region.psi[0]


def test_where_only_what_looks_right_is_served_there_is_no_region(estimator: SDMEstimator) -> None:
    lucky = [prompt(f"{h}", [UNSURE, float(h)], [0, 0], [1, 1]) for h in torch.linspace(0.2, 1.5, 60)]
    region = regions_of_policy(estimator, Attempts.measure(estimator, lucky))[0.9]
    assert (region.alpha, region.found) == (0.9, False)
    assert region.psi.isinf().all()
