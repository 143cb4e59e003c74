"""Effective sample sizes and the bands they give."""

from __future__ import annotations

import math

import pytest
import torch

from candor.sdm.distance import ClasswiseECDF
from candor.sdm.sample_size import band, dkw_epsilon, effective_sample_size


def test_points_below_count_and_never_the_whole_class() -> None:
    q_primes = ClasswiseECDF.from_classes(
        [torch.tensor([0.0, 0.0, 1.0, 5.0]), torch.tensor([2.0]), torch.empty(0)]
    )
    got = effective_sample_size(torch.tensor([0.0, 1.0, 1.5, 9.0]), q_primes)
    assert got.tolist() == [[0, 0, 0], [2, 0, 0], [3, 0, 0], [3, 0, 0]]


def test_epsilon_is_the_dkw_width() -> None:
    got = dkw_epsilon(torch.tensor([0, 1, 200]), 0.9)
    assert got.tolist() == pytest.approx([1.0, math.sqrt(math.log(20) / 2), math.sqrt(math.log(20) / 400)])
    assert got.dtype == torch.float64
    assert dkw_epsilon(torch.tensor([[10**9]]), 1.0).item() == 1.0


def test_more_points_and_a_lower_target_narrow_it() -> None:
    sizes = torch.arange(1, 500)
    assert (dkw_epsilon(sizes, 0.95).diff() < 0).all()
    assert (dkw_epsilon(sizes, 0.9) < dkw_epsilon(sizes, 0.99)).all()


def test_the_band_stays_within_zero_and_one() -> None:
    lower, upper = band(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.1, 0.7, 0.1], dtype=torch.float64))
    assert lower.tolist() == pytest.approx([0.0, 0.0, 0.9])
    assert upper.tolist() == pytest.approx([0.1, 1.0, 1.0])
