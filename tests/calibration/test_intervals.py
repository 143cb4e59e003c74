"""Exact intervals against closed forms, published values and a naive sum; the bootstrap against its law."""

from __future__ import annotations

from fractions import Fraction
from math import comb, isnan, nan, sqrt

import pytest
import torch

from candor.calibration.intervals import (
    Share,
    binomial_cdf,
    binomial_tails,
    bootstrap,
    clopper_pearson,
    lower_bound,
)


def test_no_hit_and_all_hits_have_closed_forms() -> None:
    # 0 of n: (1 - high)^n = 0.025; n of n mirrors it.
    for n in (1, 10, 500):
        edge = 0.025 ** (1 / n)
        assert clopper_pearson(0, n) == pytest.approx((0.0, 1 - edge), abs=1e-9)
        assert clopper_pearson(n, n) == pytest.approx((edge, 1.0), abs=1e-9)


def test_one_of_two_by_hand() -> None:
    # P(X >= 1 | p) = 1 - (1 - p)^2 = 0.025 and P(X <= 1 | p) = 1 - p^2 = 0.025.
    assert clopper_pearson(1, 2) == pytest.approx((1 - sqrt(0.975), sqrt(0.975)), abs=1e-9)


def test_the_bounds_solve_their_defining_equations_in_exact_arithmetic() -> None:
    def tail(n: int, terms: range, p: float) -> float:
        exact = Fraction(p)
        return float(sum(comb(n, i) * exact**i * (1 - exact) ** (n - i) for i in terms))

    for k, n in [(3, 10), (7, 10), (1, 40), (59, 60), (90, 120)]:
        low, high = clopper_pearson(k, n)
        assert tail(n, range(k, n + 1), low) == pytest.approx(0.025, abs=1e-9)
        assert tail(n, range(k + 1), high) == pytest.approx(0.025, abs=1e-9)


def test_the_distribution_function_stays_finite_where_terms_would_overflow() -> None:
    # C(20000, 10000) has 6,019 digits. By symmetry P(X <= 9999) = (1 - P(X = 10000)) / 2, and
    # P(X = n/2) = 1 / sqrt(pi n / 2) to relative 1/(4n).
    expected = (1 - 1 / sqrt(torch.pi * 10_000)) / 2
    assert binomial_cdf(9_999, 20_000, 0.5) == pytest.approx(expected, abs=1e-6)


def test_the_tails_by_hand_and_against_the_distribution_function() -> None:
    assert binomial_tails(2, 0.9).tolist() == pytest.approx([1.0, 0.99, 0.81, 0.0], abs=1e-12)
    assert binomial_tails(0, 0.3).tolist() == [1.0, 0.0]
    tails = binomial_tails(60, 0.35)
    exact = [sum(comb(60, i) * 0.35**i * 0.65 ** (60 - i) for i in range(k, 61)) for k in range(62)]
    assert tails.tolist() == pytest.approx(exact, abs=1e-12)
    assert binomial_cdf(20, 60, 0.35) == pytest.approx(1 - exact[21], abs=1e-12)


def test_a_one_sided_bound_puts_all_of_delta_on_one_side() -> None:
    # n of n: bound^n = delta. k of n: P(X >= k | bound) = delta.
    assert lower_bound(59, 59, 0.05) == pytest.approx(0.05 ** (1 / 59), abs=1e-9)
    assert float(binomial_tails(80, lower_bound(71, 80, 0.1))[71]) == pytest.approx(0.1, abs=1e-9)
    assert lower_bound(71, 80, 0.025) == clopper_pearson(71, 80)[0]
    assert lower_bound(0, 7, 0.05) == 0.0


def test_a_wider_confidence_is_a_wider_interval_and_more_draws_a_narrower() -> None:
    low, high = clopper_pearson(30, 40)
    wide_low, wide_high = clopper_pearson(30, 40, confidence=0.99)
    many_low, many_high = clopper_pearson(300, 400)
    assert wide_low < low < many_low < 0.75 < many_high < high < wide_high


@pytest.mark.parametrize(("hits", "of"), [(-1, 5), (6, 5), (0, 0)])
def test_counts_that_are_none(hits: int, of: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= hits <= of"):
        clopper_pearson(hits, of)


def test_a_share_of_nothing_has_no_value() -> None:
    assert Share.count(torch.zeros(0, dtype=torch.bool)) == Share(0, 0, None, None, None)


def test_a_share_counts() -> None:
    share = Share.count(torch.tensor([True, False, True, True]))
    assert (share.hits, share.of, share.value) == (3, 4, 0.75)


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval() -> None:
    values = (torch.arange(400) % 2).double()  # mean 1/2, standard error 1/40
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400, seed=0)
    # A percentile of 1000 redraws has a standard error of about 0.11 standard errors here; 4 of them.
    assert low == pytest.approx(0.5 - 1.96 / 40, abs=0.011)
    assert high == pytest.approx(0.5 + 1.96 / 40, abs=0.011)


def test_the_bootstrap_repeats_with_its_seed_and_leaves_undefined_redraws_out() -> None:
    def first_or_undefined(rows: torch.Tensor) -> float:
        return nan if rows[0] == 0 else float(rows[0])

    assert bootstrap(first_or_undefined, 3, seed=1) == bootstrap(first_or_undefined, 3, seed=1) == (1.0, 2.0)
    low, high = bootstrap(lambda rows: nan, 3, seed=1)
    assert isnan(low)
    assert isnan(high)
