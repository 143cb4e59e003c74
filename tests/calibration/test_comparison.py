"""The comparison that training makes against the exact one, in every arrangement."""

from __future__ import annotations

import pytest
import torch

import calibration.comparison as comparison
from calibration.comparison import Grouped, compare_others, compare_own
from sdm.similarity import neighbourhood, support_neighbourhood
from sdm.support import Support


@pytest.mark.parametrize("symmetric", [0, 2**26])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_it_agrees_where_nothing_is_close(
    classes: int, symmetric: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "TILE", 64)  # several tiles, the last one short
    monkeypatch.setattr(comparison, "SYMMETRIC", symmetric)
    generator = torch.Generator().manual_seed(classes)
    rows, labels = torch.randn(350, 6, generator=generator) + 5, torch.arange(350) % classes
    wrong = torch.rand(350, generator=generator) < 0.1
    predictions = torch.where(wrong, (labels + 1) % classes, labels)
    rows[:, 0] += labels
    grouped = Grouped.of(rows[:300], labels[:300], predictions[:300], classes)
    support = Support(rows[:300], labels[:300], predictions[:300])
    for got, expected in (
        (compare_own(grouped), support_neighbourhood(support)),
        (compare_others(rows[300:], labels[300:], grouped), neighbourhood(rows[300:], labels[300:], support)),
    ):
        assert torch.equal(got.q, expected.q)
        assert torch.allclose(got.d_nearest, expected.d_nearest, atol=1e-4)


def test_caps_are_one_lower_for_the_training_half_itself() -> None:
    ones = torch.ones(20, dtype=torch.int64)
    rows = torch.arange(20.0).unsqueeze(1)
    grouped = Grouped.of(rows, ones, ones, 2)
    assert compare_own(grouped).q.tolist() == [19] * 20
    assert compare_own(grouped, max_q=5).q.tolist() == [4] * 20
    assert compare_others(rows, ones, grouped, max_q=5).q.tolist() == [5] * 20
    assert compare_others(rows, 0 * ones, grouped).q.tolist() == [0] * 20
