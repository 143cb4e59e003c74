"""The comparison that training makes against the exact one, in every arrangement and along a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from candor.calibration import distances
from candor.calibration.distances import KeptDistances
from candor.sdm.similarity import Neighbourhood, neighbourhood, support_neighbourhood
from candor.sdm.support import Support


def exact(
    x: Tensor, weight: Tensor, labels: Tensor, y: Tensor, n: int
) -> tuple[Neighbourhood, Neighbourhood]:
    """Of rows x, of which the first n are the training half."""
    h_prime = x @ weight.T
    support = Support(h_prime[:n], labels[:n], y[:n])
    return support_neighbourhood(support), neighbourhood(h_prime[n:], y[n:], support)


@pytest.mark.parametrize("kept", [0, 2**27])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_it_agrees_where_nothing_is_close(classes: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS", 64)  # several blocks, the last one short
    monkeypatch.setattr(distances, "KEPT", kept)
    generator = torch.Generator().manual_seed(classes)
    x, labels = (
        torch.randn(350, 6, generator=generator) + 5,
        torch.randint(classes, (350,), generator=generator),
    )
    x[:, 0] += labels
    wrong = torch.rand(350, generator=generator) < 0.1
    y = torch.where(wrong, (labels + 1) % classes, labels)
    weight = torch.randn(5, 6, generator=generator)
    found = KeptDistances(x[:300], labels[:300], x[300:], classes).neighbourhoods(weight, y[:300], y[300:])
    for got, expected in zip(found, exact(x, weight, labels, y, 300), strict=True):
        assert torch.equal(got.q, expected.q)
        assert torch.allclose(got.d_nearest, expected.d_nearest, atol=1e-4)


@pytest.mark.parametrize(("rank", "size"), [(3, 1e-2), (40, 1e-2), (300, 1e-2), (3, 1e-9), (0, 0.0)])
def test_distances_follow_the_weights(rank: int, size: float) -> None:
    """Changes of low rank, of a rank that no narrow product holds, too small to matter, and none."""
    generator = torch.Generator().manual_seed(0)
    n, wide, tall = 200, 300, 320
    x, labels = torch.randn(n + 50, wide, generator=generator), torch.arange(n + 50) % 2
    x[:, 0] += 3 * labels
    weight = torch.randn(tall, wide, generator=generator) / wide**0.5
    compared = KeptDistances(x[:n], labels[:n], x[n:], 2)
    for epoch in range(2 * distances.RENEWED + 2):
        y = torch.where(torch.rand(n + 50, generator=generator) < 0.1, 1 - labels, labels)
        found = compared.neighbourhoods(weight, y[:n], y[n:])
        if epoch % 10 == 1:
            for got, expected in zip(found, exact(x, weight, labels, y, n), strict=True):
                assert torch.allclose(got.d_nearest, expected.d_nearest, rtol=1e-5)
                assert (got.q != expected.q).sum() <= 1  # two distances may be a rounding apart
        left = torch.randn(tall, rank, generator=generator)
        weight = weight + size * left @ torch.randn(rank, wide, generator=generator) / wide


def test_weights_that_are_no_numbers_leave_no_q() -> None:
    x, labels = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    weight = torch.ones(100, 20)
    compared = KeptDistances(x, labels, x, 2)
    compared.neighbourhoods(weight, labels, labels)
    own, others = compared.neighbourhoods(weight * torch.nan, labels, labels)
    assert not own.q.any()
    assert not others.q.any()


def test_caps_are_one_lower_for_the_training_half_itself() -> None:
    ones = torch.ones(20, dtype=torch.int64)
    x = torch.arange(20.0).unsqueeze(1)
    compared, weight = KeptDistances(x, ones, x, 2), torch.ones(1, 1)
    assert [found.q.tolist() for found in compared.neighbourhoods(weight, ones, ones)] == [
        [19] * 20,
        [20] * 20,
    ]
    assert [found.q.tolist() for found in compared.neighbourhoods(weight, ones, ones, 5)] == [
        [4] * 20,
        [5] * 20,
    ]
    assert compared.neighbourhoods(weight, ones, 0 * ones)[1].q.tolist() == [0] * 20
