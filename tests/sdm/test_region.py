"""Algorithm 1 against a plain transcription, the quantile's index, minimum counts, and admission."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from candor.sdm.conventions import DEFAULT, RECORDED, Conventions
from candor.sdm.region import Region, find_region, minimum_points, q_prime, quantile_index


def naive_region(
    sdm: Tensor, q_prime: Tensor, labels: Tensor, alpha: float, conventions: Conventions
) -> tuple[np.float32, list[np.float32]]:
    """Every candidate in turn, every class sorted anew, every comparison of scores in numpy's float32."""
    scores, similarity, classes = sdm.numpy(), q_prime.numpy(), labels.numpy()
    assert scores.dtype == similarity.dtype == np.float32
    target = np.float32(alpha)
    for candidate in sorted({v for v in similarity if v > 0}):
        psi = []
        for c in range(scores.shape[1]):
            values = np.sort(scores[(classes == c) & (similarity >= candidate), c])
            n = len(values)
            if n == 0 or n < minimum_points(alpha, conventions):
                psi.append(np.float32(0))
                continue
            if conventions.quantile_index == "double":
                index = int((1 - alpha) * n)
            else:
                index = math.floor((1 - Fraction(str(alpha))) * n)
            psi.append(values[min(index, n - 1)])
        if all(value >= target for value in psi):
            return candidate, psi
    return np.float32(np.inf), [np.float32(conventions.missing_psi)] * scores.shape[1]


@st.composite
def calibrations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Few distinct q' and scores, the true class's mostly alpha itself or a float32 beside it: ties are common."""
    alpha = draw(st.sampled_from([0.6, 0.7, 0.75, 0.9, 0.95, 1.0]))
    n, classes = draw(st.integers(1, 60)), draw(st.integers(2, 3))
    at = np.float32(alpha)
    under, over = (float(np.nextafter(at, np.float32(end))) for end in (0, 1))
    own = st.sampled_from([1.0, over, float(at), float(at), float(at), under])
    scores = torch.full((n, classes), 0.3)
    labels = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    scores[torch.arange(n), labels] = torch.tensor(draw(st.lists(own, min_size=n, max_size=n)))
    q = draw(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 7.0, 40.0]), min_size=n, max_size=n))
    return scores, torch.tensor(q), labels, alpha


@settings(max_examples=300, deadline=None)
@given(calibrations(), st.sampled_from([DEFAULT, RECORDED]))
def test_algorithm_1_is_its_plain_transcription(
    case: tuple[Tensor, Tensor, Tensor, float], conventions: Conventions
) -> None:
    sdm, q, labels, alpha = case
    got = find_region(sdm, q, labels, alpha, conventions)
    expected_q, expected_psi = naive_region(sdm, q, labels, alpha, conventions)
    assert got.q_prime_min == expected_q
    assert got.psi.tolist() == [float(value) for value in expected_psi]


@pytest.mark.parametrize("conventions", [DEFAULT, RECORDED])
def test_a_score_of_alpha_reaches_alpha(conventions: Conventions) -> None:
    """0.9 in float32 is a little less than 0.9 in double, and as much as 0.9 in float32."""
    q = torch.tensor([31.0] * 10 + [14.0] * 10).repeat(2)
    labels = torch.tensor([0] * 20 + [1] * 20)

    def found(score: float) -> tuple[float, list[float]]:
        own = torch.tensor([0.99] * 10 + [score] * 10).repeat(2)
        sdm = torch.stack([torch.where(labels == c, own, 1 - own) for c in range(2)], dim=1)
        region = find_region(sdm, q, labels, 0.9, conventions)
        return region.q_prime_min, region.psi.tolist()

    assert float(np.float32(0.9)) < 0.9
    assert found(0.9) == (14.0, [float(np.float32(0.9))] * 2)
    assert found(float(np.nextafter(np.float32(0.9), np.float32(0))))[0] == 31.0


@pytest.mark.parametrize("alpha", [0.6, 0.9, 0.95])
def test_algorithm_1_on_many_random_points(alpha: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * alpha))
    n = 600
    labels = torch.randint(0, 2, (n,), generator=generator)
    q = torch.randint(0, 80, (n,), generator=generator).float() + torch.rand(n, generator=generator)
    right = torch.rand(n, generator=generator) < 0.5 + q / 160
    own = torch.where(right, 1 - 0.2 * torch.rand(n, generator=generator) / (1 + q), 0.4)
    sdm = torch.stack([torch.where(labels == c, own, 1 - own) for c in range(2)], dim=1)
    got = find_region(sdm, q, labels, alpha)
    expected_q, expected_psi = naive_region(sdm, q, labels, alpha, DEFAULT)
    assert got.q_prime_min == expected_q
    assert got.psi.tolist() == [float(value) for value in expected_psi]
    assert got.found


def test_order_of_the_points_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    sdm = torch.rand(200, 2, generator=generator).sqrt().sqrt()
    q, labels = (
        torch.randint(0, 9, (200,), generator=generator).float(),
        torch.randint(0, 2, (200,), generator=generator),
    )
    first = find_region(sdm, q, labels, 0.6)
    order = torch.randperm(200, generator=generator)
    again = find_region(sdm[order], q[order], labels[order], 0.6)
    assert first.q_prime_min == again.q_prime_min
    assert torch.equal(first.psi, again.psi)
    assert first.found


def test_the_exact_index_mends_the_double_s() -> None:
    n = torch.tensor([10, 20, 100])
    assert quantile_index(n, 0.9).tolist() == [1, 2, 10]
    assert quantile_index(n, 0.9, RECORDED).tolist() == [0, 1, 9]
    assert quantile_index(torch.tensor([0, 1, 5]), 0.6).tolist() == [-1, 0, 2]
    assert quantile_index(torch.tensor([3]), 1.0).tolist() == [0]


def test_no_threshold_rests_on_a_single_point() -> None:
    assert [minimum_points(a) for a in (0.6, 0.9, 0.95, 0.99, 1.0)] == [3, 10, 20, 100, math.inf]
    assert minimum_points(0.99, RECORDED) == 1
    sdm = torch.tensor([[0.99, 0.01], [0.01, 0.99]])
    q, labels = torch.tensor([5.0, 5.0]), torch.tensor([0, 1])
    assert find_region(sdm, q, labels, 0.9, RECORDED).found
    assert not find_region(sdm, q, labels, 0.9).found
    nineteen, twenty = (find_region(sdm.repeat(n, 1), q.repeat(n), labels.repeat(n), 0.95) for n in (19, 20))
    assert (nineteen.found, twenty.found) == (False, True)


def test_a_missing_region_admits_nothing() -> None:
    nothing = find_region(torch.empty(0, 2), torch.empty(0), torch.empty(0, dtype=torch.int64), 0.9)
    assert (nothing.q_prime_min, nothing.psi.tolist()) == (math.inf, [math.inf, math.inf])
    recorded = Region(0.9, math.inf, torch.zeros(2))
    with_psi = Region(0.9, math.inf, torch.full((2,), 0.9))
    for region in (nothing, recorded, with_psi):
        sure = torch.tensor([[1.0, 0.0]])
        admitted = region.admit(sure, torch.tensor([0]), torch.tensor([math.inf]), torch.tensor([False]))
        assert admitted.tolist() == [False]


def test_a_class_without_points_has_no_region() -> None:
    sdm = torch.tensor([[0.99, 0.01]]).repeat(50, 1)
    assert not find_region(sdm, torch.full((50,), 9.0), torch.zeros(50).long(), 0.9).found


def test_admission_needs_each_condition() -> None:
    region = Region(0.9, 10.0, torch.tensor([0.92, 0.95]))
    rows = [
        # SDM of class 0, y_hat, q', is_ood, admitted
        (0.93, 0, 10.0, False, True),
        (0.92, 0, 10.0, False, True),  # both thresholds belong to the region
        (0.91, 0, 10.0, False, False),
        (0.93, 0, 9.9, False, False),
        (0.93, 0, 10.0, True, False),
        (0.06, 1, 10.0, False, False),  # 0.94 is under the other class's threshold
        (0.04, 1, 10.0, False, True),
        (0.93, 1, 10.0, False, False),  # the class above its threshold isn't the predicted one
    ]
    top = torch.tensor([row[0] for row in rows])
    got = region.admit(
        torch.stack([top, 1 - top], dim=1),
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
    )
    assert got.tolist() == [row[4] for row in rows]


def test_two_classes_above_their_thresholds_are_not_admitted() -> None:
    region = Region(0.9, 1.0, torch.tensor([0.5, 0.4]))
    got = region.admit(
        torch.tensor([[0.55, 0.45]]), torch.tensor([0]), torch.tensor([9.0]), torch.tensor([False])
    )
    assert got.tolist() == [False]


def test_q_prime_lies_between_one_and_q_and_vanishes_with_q() -> None:
    q = torch.tensor([0, 1, 1, 7, 7, 10**9])
    top = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0, 1.0])
    assert q_prime(q, top).tolist() == pytest.approx([0.0, 1.0, 1.0, 3.0, 7.0, 1e9])
    floors = q_prime(torch.arange(50), torch.full((50,), 1 / 3)).floor()
    assert torch.equal(floors == 0, torch.arange(50) == 0)


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.01, 95.0])
def test_alpha_is_a_target_accuracy(alpha: float) -> None:
    with pytest.raises(ValueError, match="target accuracy"):
        find_region(torch.ones(1, 2), torch.ones(1), torch.zeros(1).long(), alpha)


def test_the_least_alpha_lies_just_above_one_half() -> None:
    labels = torch.arange(20) % 2
    sdm = torch.nn.functional.one_hot(labels).float()
    assert find_region(sdm, torch.ones(20), labels, 0.501).found
