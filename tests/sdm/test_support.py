"""Exact search: rough distances within their slack, nearest rows as a plain search finds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from candor.sdm.arithmetic import pair_distances
from candor.sdm.support import Support


def make_support(n: int, width: int, seed: int, offset: float = 0.0) -> Support:
    generator = torch.Generator().manual_seed(seed)
    h_prime = torch.randn(n, width, generator=generator) + offset
    labels = torch.randint(0, 2, (n,), generator=generator)
    return Support(h_prime, labels, torch.randint(0, 2, (n,), generator=generator))


def all_exact(queries: Tensor, support: Support) -> Tensor:
    """(n, N) float64, pair by pair."""
    return torch.stack([pair_distances(q.expand_as(support.h_prime), support.h_prime) for q in queries])


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e6])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_rough_distances_keep_within_their_slack(offset: float, count: int) -> None:
    support = make_support(500, 64, 0, offset)
    queries = torch.randn(count, 64, generator=torch.Generator().manual_seed(1)) + offset
    exact = all_exact(queries, support)
    centre = support.h_prime.mean(dim=0)
    centred = (queries - centre).double()
    constant = (centred.square().sum(dim=1) + 2 * centred @ centre.double()).unsqueeze(1)
    for block in support.rough(queries):
        rough = block.distances.double() + constant[block.rows]
        assert ((rough - exact[block.rows]).abs() <= block.slack.unsqueeze(1)).all()
    for k in (3, 400):  # gathered, and read in order
        indices = torch.arange(0, 500, 500 // k)[:k].repeat(count)
        rows = torch.arange(count).repeat_interleave(len(indices) // count)
        rough, slack = support.rough_pairs(queries, rows, indices)
        error = rough.double() + constant[rows, 0] - exact[rows, indices]
        assert (error.abs() <= slack[rows]).all()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_nearest_is_that_of_a_plain_search(offset: float) -> None:
    support = make_support(300, 16, 2, offset)
    queries = torch.cat(
        [torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) + offset, support.h_prime[:5]]
    )
    distances, indices = support.nearest(queries, 7)
    expected = all_exact(queries, support).sort(dim=1, stable=True)
    assert torch.equal(indices, expected.indices[:, :7])
    assert torch.equal(distances, expected.values[:, :7].float())


def test_equal_distances_come_in_ascending_index() -> None:
    h_prime = torch.tensor([[3.0], [1.0], [-1.0], [1.0], [-1.0]])
    support = Support(h_prime, torch.zeros(5).long(), torch.zeros(5).long())
    distances, indices = support.nearest(torch.zeros(1, 1), 5)
    assert indices.tolist() == [[1, 2, 3, 4, 0]]
    assert distances.tolist() == [[1.0, 1.0, 1.0, 1.0, 9.0]]


def test_k_must_fit_the_support() -> None:
    support = make_support(3, 2, 4)
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
            support.nearest(torch.zeros(1, 2), k)


def test_a_support_is_checked() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="N > 0"):
        Support(torch.zeros(0, 3), labels[:0], labels[:0])
    with pytest.raises(ValueError, match=r"\(2, 3\), \(1,\), \(2,\)"):
        Support(torch.zeros(2, 3), labels[:1], labels)
    with pytest.raises(ValueError, match=r"support rows \[1\]"):
        Support(torch.tensor([[0.0], [float("nan")]]), labels, labels)


def test_updating_appends_and_leaves_the_original() -> None:
    support = make_support(4, 2, 5)
    grown = support.updated(torch.ones(2, 2), torch.tensor([-1, -99]), torch.tensor([0, 1]))
    assert len(support) == 4
    assert torch.equal(grown.h_prime[:4], support.h_prime)
    assert grown.labels[4:].tolist() == [-1, -99]
    assert not grown.valid(0)[4:].any()
    assert not grown.valid(1)[4:].any()
