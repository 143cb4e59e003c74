"""Cohen's kappa of two reviewers, by hand."""

from __future__ import annotations

import pytest

from candor.policy.agreement import Agreement


def test_kappa_by_hand() -> None:
    """Cohen's table of 20, 5, 10 and 15: p_o = 0.7, p_e = 0.5."""
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    found = Agreement.of(pairs)
    assert (found.both, found.first, found.second, found.neither) == (20, 5, 10, 15)
    assert found.share == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)


def test_extremes() -> None:
    assert Agreement(3, 0, 0, 4).kappa == 1
    assert Agreement(0, 2, 2, 0).kappa == -1
    assert (Agreement(0, 0, 0, 0).share, Agreement(0, 0, 0, 0).kappa) == (None, None)
    assert Agreement(5, 0, 0, 0).kappa is None  # whoever always says the same shows no agreement
