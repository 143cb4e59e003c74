"""Correct rounding, and values that don't depend on the batch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from candor.sdm.arithmetic import RoundedLinear, pair_distances


def random_rows(n: int, width: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale


def correctly_rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The exact rational value, rounded to float64 and then to float32, in plain Python."""
    rows = [[Fraction(v) for v in row] for row in x.tolist()]
    units = [[Fraction(v) for v in unit] for unit in weight.tolist()]
    values = [
        [
            float(sum(a * b for a, b in zip(row, unit, strict=True)) + Fraction(c))
            for unit, c in zip(units, bias.tolist(), strict=True)
        ]
        for row in rows
    ]
    return torch.tensor(np.array(values, dtype=np.float64).astype(np.float32))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_a_rounded_linear_map_is_the_exact_value_rounded(scale: float) -> None:
    x, weight, bias = random_rows(4, 61, 0, scale), random_rows(30, 61, 1), random_rows(1, 30, 2)[0]
    assert torch.equal(RoundedLinear(weight, bias)(x), correctly_rounded(x, weight, bias))


def test_cancellation_that_float64_products_lose_is_resolved() -> None:
    # 2^60 + 1 - 2^60 + 2^-30: any order in float64 loses the small terms somewhere.
    x = torch.tensor([[2.0**60, 1.0, -(2.0**60), 2.0**-30]])
    assert RoundedLinear(torch.ones(1, 4), torch.zeros(1))(x).item() == 1.0
    assert RoundedLinear(torch.ones(1, 4), -torch.ones(1))(x).item() == 2.0**-30


@pytest.mark.parametrize("width", [1, 7, 96, 1158])
def test_a_row_is_mapped_alike_alone_and_in_any_batch(width: int) -> None:
    linear = RoundedLinear(random_rows(129, width, 3), random_rows(1, 129, 4)[0])
    x = random_rows(200, width, 5)
    whole = linear(x)
    for size in (1, 2, 3, 5, 16, 17, 64, 65, 199):
        for start in (0, 1, 200 - size):
            assert torch.equal(linear(x[start : start + size]), whole[start : start + size])


def test_overflow_becomes_an_infinity_not_a_nan() -> None:
    linear = RoundedLinear(torch.full((1, 2), 1e30), torch.zeros(1))
    assert linear(torch.full((1, 2), 1e30)).item() == float("inf")


@pytest.mark.parametrize("width", [1, 2, 3, 17, 1000])
def test_pair_distances(width: int) -> None:
    a, b = random_rows(50, width, 6), random_rows(50, width, 7)
    exact = [
        sum((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(u, v, strict=True))
        for u, v in zip(a.tolist(), b.tolist(), strict=True)
    ]
    got = pair_distances(a, b)
    assert torch.allclose(
        got, torch.tensor([float(e) for e in exact], dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert torch.equal(got, pair_distances(b, a))
    assert torch.equal(pair_distances(a, a), torch.zeros(50, dtype=torch.float64))
    alone = torch.cat([pair_distances(a[i : i + 1], b[i : i + 1]) for i in range(50)])
    assert torch.equal(got, alone)
