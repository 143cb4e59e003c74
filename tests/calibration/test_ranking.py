"""Figures worked out by hand, against naive references, and the laws that tie them to each other."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from candor.calibration.ranking import (
    Figures,
    admission,
    answer_order,
    interval,
    probabilistic,
    ranking,
    redrawn,
    rms_calibration,
    shares,
    summarise,
)

CONFIDENCE = torch.tensor([0.9, 0.8, 0.7, 0.6])
RIGHT = torch.tensor([True, False, True, False])


def once(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.float64)


def rank(confidence: Tensor, right: Tensor) -> dict[str, float]:
    return {name: float(values[0]) for name, values in ranking(once(len(right)), confidence, right).items()}


def test_four_rows_by_hand() -> None:
    # Risks at k = 1..4: 0, 1/2, 1/3, 1/2. With the two errors last: 0, 0, 1/3, 1/2.
    found = rank(CONFIDENCE, RIGHT)
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["e_aurc"] == pytest.approx(found["aurc"] - (1 / 3 + 1 / 2) / 4)
    # E_k / n at k = 0..4: 0, 0, 1/4, 1/4, 2/4, by trapezoids.
    assert found["augrc"] == pytest.approx((0 + 1 / 8 + 1 / 4 + 3 / 8) / 4)
    assert found["prr"] == pytest.approx((1 / 2 - 1 / 3) / (1 / 2 - 5 / 24))
    assert found["roc_auc"] == 3 / 4  # of four pairs, 0.7 against 0.8 is lost
    assert found["coverage_at_risk"] == 1 / 4


def test_a_perfect_and_a_useless_order() -> None:
    right = torch.tensor([True] * 19 + [False])
    perfect = rank(-torch.arange(20.0), right)
    assert perfect["e_aurc"] == pytest.approx(0, abs=1e-12)
    assert perfect["prr"] == pytest.approx(1)
    assert perfect["roc_auc"] == 1
    assert perfect["coverage_at_risk"] == 1  # 1 of 20 is exactly 5 %
    constant = rank(torch.zeros(20), right)
    assert constant["aurc"] == pytest.approx(1 / 20)
    assert constant["prr"] == pytest.approx(0, abs=1e-12)
    assert constant["roc_auc"] == 0.5
    assert rank(torch.zeros(4), RIGHT)["coverage_at_risk"] == 0  # a threshold takes all four or none


def test_nothing_wrong_and_nothing_right() -> None:
    for right, aurc in ((torch.ones(5).bool(), 0.0), (torch.zeros(5).bool(), 1.0)):
        found = rank(torch.rand(5, generator=torch.Generator().manual_seed(0)), right)
        assert found["aurc"] == pytest.approx(aurc)
        assert found["coverage_at_risk"] == 1 - aurc
        assert torch.tensor([found["prr"], found["roc_auc"]]).isnan().all()


def test_ties_stand_for_the_mean_over_their_orders() -> None:
    confidence = torch.tensor([3.0, 2, 2, 2, 1])
    right = torch.tensor([True, False, True, True, False])
    orders = [torch.tensor([0, *middle, 4]) for middle in permutations([1, 2, 3])]
    mean = sum(rank(-torch.arange(5.0), right[order])["aurc"] for order in orders) / len(orders)
    assert rank(confidence, right)["aurc"] == pytest.approx(mean)


def test_weights_are_repeated_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    confidence = torch.randint(0, 7, (30,), generator=generator).double()
    right = torch.rand(30, generator=generator) < 0.7
    drawn = torch.randint(30, (30,), generator=generator)
    weights = torch.bincount(drawn, minlength=30).double().unsqueeze(0)
    repeated = rank(confidence[drawn], right[drawn])
    for name, values in ranking(weights, confidence, right).items():
        assert float(values[0]) == pytest.approx(repeated[name]), name


def test_laws_on_random_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    for n in (5, 50, 400):
        confidence = torch.randint(0, 20, (n,), generator=generator).double()
        right = torch.rand(n, generator=generator) < 0.8
        right[:2] = torch.tensor([True, False])
        found = rank(confidence, right)
        accuracy = float(right.double().mean())
        assert found["roc_auc"] == pytest.approx(roc_auc_score(right.numpy(), confidence.numpy()))
        # Traub et al., 2407.01032, equation 8.
        wrong = 1 - accuracy
        assert found["augrc"] == pytest.approx((1 - found["roc_auc"]) * accuracy * wrong + wrong**2 / 2)
        assert rank(3 * confidence - 7, right) == found  # the order alone counts


def test_probabilities_by_hand() -> None:
    p = torch.tensor([0.95, 0.95, 0.65])
    y_hat = torch.tensor([1, 1, 0])
    right = torch.tensor([True, False, True])
    found = probabilistic(once(3), p, y_hat, right)
    assert float(found["top_label_ece"][0]) == pytest.approx((abs(-0.05 + 0.95) + abs(-0.35)) / 3)
    assert float(found["brier"][0]) == pytest.approx((0.05**2 + 0.95**2 + 0.35**2) / 3)


def test_verdicts_are_binned_apart() -> None:
    p, right = torch.tensor([0.65, 0.65]), torch.tensor([True, False])
    together = probabilistic(once(2), p, torch.tensor([1, 1]), right)
    apart = probabilistic(once(2), p, torch.tensor([1, 0]), right)
    assert float(together["top_label_ece"][0]) == pytest.approx(0.3 / 2)
    assert float(apart["top_label_ece"][0]) == pytest.approx((0.35 + 0.65) / 2)
    certain = probabilistic(once(2), torch.ones(2), torch.tensor([1, 0]), torch.ones(2).bool())
    assert float(certain["top_label_ece"][0]) == float(certain["brier"][0]) == 0


def test_shares_of_the_admitted_by_hand() -> None:
    admitted = torch.tensor([True, True, True, False, True, True])
    y_hat = torch.tensor([1, 1, 0, 1, 1, 0])
    y = torch.tensor([1, 0, 0, 1, 1, 1])
    found = shares(admission(admitted, y_hat, y), seed=0)
    counts = {name: (figure.hits, figure.of) for name, figure in found.items()}
    assert counts == {
        "admitted": (5, 6),
        "answered": (3, 6),
        "marginal": (3, 5),
        "class_0": (1, 2),
        "class_1": (2, 3),
        "predicted_0": (1, 2),
        "predicted_1": (2, 3),
    }
    assert found["marginal"].value == pytest.approx(0.6)
    assert found["marginal"].exact == pytest.approx((0.1466, 0.9473), abs=1e-4)  # Clopper-Pearson, 3 of 5


def test_shares_of_nothing() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    found = shares(admission(none, torch.ones(4).long(), torch.ones(4).long()), seed=0)
    assert found["admitted"].value == 0
    assert (found["marginal"].value, found["marginal"].low, found["marginal"].exact) == (None, None, None)


def test_the_order_of_answers() -> None:
    confidence, y_hat = torch.tensor([0.6, 0.9, 0.9, 0.5]), torch.tensor([1, 1, 0, 0])
    assert answer_order(confidence, y_hat).argsort(descending=True).tolist() == [1, 0, 3, 2]
    assert answer_order(-confidence, y_hat).argsort(descending=True).tolist() == [0, 1, 2, 3]


def test_the_bootstrap_is_as_wide_as_theory_says_and_the_same_for_every_method() -> None:
    right = torch.arange(400) < 300

    def mean(weights: Tensor) -> Figures:
        return {"mean": weights @ right.double() / weights.sum(1)}

    values = redrawn(mean, 400, seed=3)["mean"]
    assert float(values[0]) == 0.75
    assert len(values) == 1001
    # The standard error is 0.02165; 1000 redraws know it to 1 / sqrt(2000), 2.2 %, so 10 % is over four of those.
    assert float(values[1:].std()) == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.1)
    figure = summarise(values)
    assert figure.low is not None
    assert figure.high is not None
    assert 0.70 < figure.low < 0.75 < figure.high < 0.80
    assert redrawn(mean, 400, seed=3)["mean"].equal(values)
    assert not redrawn(mean, 400, seed=4)["mean"].equal(values)


def test_redraws_that_leave_a_figure_undefined_are_left_out() -> None:
    nan = float("nan")
    assert interval(torch.tensor([nan, 1.0, nan, 1.0])) == (1.0, 1.0)
    assert interval(torch.tensor([nan])) == (None, None)


@pytest.mark.parametrize("off", [0.0, 0.06])
def test_rms_calibration_says_what_is_left_without_chance(off: float) -> None:
    """Probabilities off by so much everywhere, 100 sets of 500: ECE says more, this on average the truth."""
    generator = torch.Generator().manual_seed(0)
    squares, covered, eces = [], 0, []
    for seed in range(100):
        truth = torch.sigmoid(3 * torch.randn(500, generator=generator, dtype=torch.float64))
        said = truth + off * (0.5 - truth).sign()
        right = torch.rand(500, generator=generator, dtype=torch.float64) < truth
        value, low, high = rms_calibration(said, right, seed)
        squares.append(value**2)
        covered += low <= off <= high
        bins = torch.zeros(500, dtype=torch.int64)
        eces.append(float(probabilistic(once(500), said, bins, right)["top_label_ece"]))
    assert sum(eces) / 100 > off + 0.01
    assert (sum(squares) / 100) ** 0.5 == pytest.approx(off, abs=0.03 if off == 0 else 0.01)
    assert covered >= 90


def test_rms_calibration_by_hand() -> None:
    """One bin of each kind for 30 rows: 15 pairs, each of mean 1/2 too high where half are right."""
    said, right = torch.ones(30), torch.arange(30) % 2 == 0
    # Each bin: mean 1/2 squared, less its variance: 1/4 / (2 - 1).
    assert rms_calibration(said, right, 0)[0] == 0
    assert rms_calibration(said, torch.zeros(30, dtype=torch.bool), 0) == (1, 1, 1)
