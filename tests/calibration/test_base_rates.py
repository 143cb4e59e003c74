"""A shift of the base rate, against counts made by hand and against data that was really reweighted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from candor.calibration.base_rates import base_rate_report, base_rate_table, least_base_rate, shifted
from candor.calibration.evaluate import Evaluation, RegionFigures, region_figures
from candor.calibration.intervals import Share, clopper_pearson
from candor.calibration.served import ServedRows


def reading(answered_right: int, right: int, answered_wrong: int, wrong: int) -> RegionFigures:
    """Of so many answered among the right and among the wrong."""
    y = torch.tensor([1] * right + [0] * wrong)
    answered = torch.tensor(
        [True] * answered_right + [False] * (right - answered_right)
        + [True] * answered_wrong + [False] * (wrong - answered_wrong)
    )  # fmt: skip
    n = len(y)
    none = torch.zeros(n)
    return region_figures(ServedRows(y, torch.ones(n), answered, none, none, none, none))


def test_accuracy_at_another_base_rate_by_hand() -> None:
    found = reading(80, 100, 10, 100)  # r_1 = 0.8, r_0 = 0.1
    assert shifted(found, 0.5).value == pytest.approx(0.4 / 0.45)
    assert shifted(found, 0.1).value == pytest.approx(0.08 / 0.17)
    assert shifted(found, 0.0).value == 0.0
    assert shifted(found, 1.0).value == 1.0


def test_at_its_own_base_rate_it_is_what_was_measured() -> None:
    found = reading(60, 150, 7, 50)
    assert shifted(found, 0.75).value == pytest.approx(60 / 67)
    assert found.accuracy_answered.value == pytest.approx(60 / 67)


def test_the_interval_takes_the_worse_end_of_both_rates() -> None:
    found = reading(80, 100, 10, 100)
    (low_0, high_0), (low_1, high_1) = (clopper_pearson(hits, 100, confidence=0.975) for hits in (10, 80))
    half = shifted(found, 0.5)
    assert half.low == pytest.approx(low_1 / (low_1 + high_0))
    assert half.high == pytest.approx(high_1 / (high_1 + low_0))
    assert half.value is not None
    assert half.low < half.value < half.high


def test_the_least_base_rate_is_where_the_lower_end_meets_the_accuracy() -> None:
    found = reading(80, 100, 2, 100)
    rate = least_base_rate(found, 0.9)
    assert shifted(found, rate).low == pytest.approx(0.9)
    assert shifted(found, rate + 0.05).low > 0.9 > shifted(found, rate - 0.05).low


def test_nothing_answered_and_classes_that_are_not_there() -> None:
    nothing = reading(0, 50, 0, 50)
    assert (shifted(nothing, 0.5).value, shifted(nothing, 0.5).low, shifted(nothing, 0.5).high) == (
        None,
        0.0,
        1.0,
    )
    assert least_base_rate(nothing, 0.9) == 1.0
    no_wrong = shifted(reading(20, 50, 0, 0), 0.5)
    assert no_wrong.value is None
    assert 0 < no_wrong.low < 0.5 < no_wrong.high == 1.0


def test_the_interval_covers_the_accuracy_of_shifted_data() -> None:
    """200 samples of 100 and 100 with r_1 = 0.7, r_0 = 0.05, judged at base rate 0.3 (true 0.857)."""
    template = reading(1, 2, 1, 2)
    generator = torch.Generator().manual_seed(0)
    truth = 0.3 * 0.7 / (0.3 * 0.7 + 0.7 * 0.05)
    covered = 0
    for _ in range(200):
        counts = [int((torch.rand(100, generator=generator) < rate).sum()) for rate in (0.7, 0.05)]
        right, wrong = (Share(hits, 100, hits / 100, None, None) for hits in counts)
        found = shifted(replace(template, answered_of_class=(wrong, right)), 0.3)
        covered += found.low <= truth <= found.high
    assert covered >= 190 - 4 * (200 * 0.05 * 0.95) ** 0.5


def test_report_and_table_say_which_base_rate_is_meant() -> None:
    found = reading(60, 150, 7, 50)
    share = Share.from_counts(150, 200)
    evaluation = Evaluation(200, {}, share, share, share, None, {0.9: found}, {0.9: reading(0, 150, 0, 50)})
    report = base_rate_report(evaluation)
    assert report["natural"]["value"] == 0.75
    assert report["lower"]["0.9"]["accuracy_answered"]["natural"]["value"] == pytest.approx(60 / 67)
    rates = [row["base_rate"] for row in report["lower"]["0.9"]["accuracy_answered"]["shifted"]]
    assert rates == [0.1, 0.25, 0.5, 0.75, 0.9]
    lines = base_rate_table(evaluation).splitlines()
    assert "natural: 75.0" in lines[0]
    assert len(lines) == 3  # the plain estimator answered nothing
    assert "89.6" in lines[2]
