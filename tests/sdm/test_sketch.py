"""A sketch's bound holds, and comparing through it decides everything as comparing without it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import candor.sdm.support as support_module
from candor.sdm.similarity import Neighbourhood, neighbourhood, support_neighbourhood
from candor.sdm.sketch import Sketch, multiplies_exactly
from candor.sdm.support import Support

pytestmark = pytest.mark.skipif(
    not multiplies_exactly(64), reason="no exact 8-bit products in this build of torch"
)


def case(kind: str, n: int = 600, width: int = 64) -> tuple[Support, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(kind))
    h_prime = torch.randn(n + 40, width, generator=generator)
    labels = torch.randint(0, 3, (n + 40,), generator=generator)
    h_prime[:, :4] += labels.unsqueeze(1)
    if kind == "far from the origin":
        h_prime += 1000
    if kind == "one outlier":
        h_prime[7] *= 1e4
    if kind == "large and small directions":
        h_prime *= torch.logspace(0, -4, width)
    if kind == "twins":
        h_prime = h_prime[torch.randint(0, 5, (n + 40,), generator=generator)]
    predictions = torch.where(torch.rand(n + 40, generator=generator) < 0.1, (labels + 1) % 3, labels)
    if kind == "a class without valid rows":
        predictions[labels == 2] = 0
    return Support(h_prime[:n], labels[:n], predictions[:n]), h_prime[n:], labels[n:]


KINDS = [
    "plain",
    "far from the origin",
    "one outlier",
    "large and small directions",
    "twins",
    "a class without valid rows",
]


def same(first: Neighbourhood, second: Neighbourhood) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("q", "d_nearest", "nearest")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_are_the_same_to_the_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries, y_hat = case(kind)
    assert support.sketch is None  # small supports do without
    expected = neighbourhood(queries, y_hat, support)
    expected_own = support_neighbourhood(support)
    monkeypatch.setattr(support_module, "SMALLEST", 1)
    sketched = Support(support.h_prime, support.labels, support.predictions)
    assert sketched.sketch is not None
    assert same(neighbourhood(queries, y_hat, sketched), expected)
    assert same(support_neighbourhood(sketched), expected_own)
    for i in range(3):
        alone = neighbourhood(queries[i : i + 1], y_hat[i : i + 1], sketched)
        assert int(alone.q) == int(expected.q[i])
        assert float(alone.d_nearest) == float(expected.d_nearest[i])


@pytest.mark.parametrize("kind", KINDS)
def test_the_slack_bounds_the_error_and_most_rows_are_settled_by_it(kind: str) -> None:
    support, queries, _ = case(kind)
    sketch = Sketch(support.h_prime, support.h_prime.mean(dim=0))
    rough, lengths = sketch.distances(queries)
    slack = sketch.slack(lengths)
    exact = (queries.double().unsqueeze(1) - support.h_prime.double()).square().sum(dim=2)
    centred = queries.double() - support.h_prime.mean(dim=0).double()
    error = rough.double() + centred.square().sum(dim=1, keepdim=True) - exact
    assert (error.abs() <= slack.unsqueeze(1)).all()
    for query, own in enumerate(error.abs()):
        rows = torch.arange(len(own))
        bound = sketch.pair_slack(lengths[query].expand(len(own), 2), rows)
        assert (own <= bound).all()
        assert (bound <= slack[query] * (1 + 1e-6)).all()
    if kind == "plain":
        assert slack.max() < 0.1 * exact.median()


def test_without_invalid_rows_all_valid_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_module, "SMALLEST", 1)
    ones = torch.ones(50, dtype=torch.int64)
    support = Support(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), ones, ones)
    queries = torch.zeros(2, 16)
    assert neighbourhood(queries, torch.tensor([1, 0]), support).q.tolist() == [50, 0]
    left_out = torch.tensor([3, 4])
    assert neighbourhood(queries, torch.tensor([1, 1]), support, exclude=left_out).q.tolist() == [49, 49]


def test_a_sketch_takes_a_quarter_of_the_support() -> None:
    support, _, _ = case("plain", n=2000, width=64)
    sketch = Sketch(support.h_prime, support.h_prime.mean(dim=0))
    assert sketch.nbytes <= support.h_prime.nbytes / 4 + 2000 * 16
