"""q against a plain search, at ties, caps, self-exclusion, and in every batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from candor.sdm.conventions import RECORDED
from candor.sdm.similarity import neighbourhood, support_neighbourhood
from candor.sdm.support import BLOCK, Support


def naive_q(
    query: Tensor, c: int, support: Support, exclude: int | None = None, passed_over: int = 0
) -> tuple[int, float, int]:
    """Sort everything by (distance, index) and walk until one row too many isn't valid."""
    distances = (support.h_prime.double() - query.double()).square().sum(dim=1).tolist()
    order = sorted((d, i) for i, d in enumerate(distances) if i != exclude)
    q = invalid = 0
    for _, i in order:
        if support.labels[i] == c and support.predictions[i] == c:
            q += 1
        elif (invalid := invalid + 1) > passed_over:
            break
    return max(0, q - passed_over), order[0][0], order[0][1]


@st.composite
def grids(draw: st.DrawFn) -> tuple[Support, Tensor, Tensor]:
    """Points on a small integer grid, where ties and duplicates abound and float64 is exact."""
    n, m, width = draw(st.integers(2, 30)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    cell = st.integers(-2, 2)
    rows = draw(st.lists(st.lists(cell, min_size=width, max_size=width), min_size=n + m, max_size=n + m))
    points = torch.tensor(rows, dtype=torch.float32)
    labels = torch.tensor(draw(st.lists(st.sampled_from([0, 1, -1, -99]), min_size=n, max_size=n)))
    predictions = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    y_hat = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=m, max_size=m)))
    return Support(points[:n], labels, predictions), points[n:], y_hat


@settings(max_examples=200, deadline=None)
@given(grids())
def test_q_is_the_leading_run_of_valid_rows(case: tuple[Support, Tensor, Tensor]) -> None:
    support, queries, y_hat = case
    got = neighbourhood(queries, y_hat, support)
    for i, query in enumerate(queries):
        expected = naive_q(query, int(y_hat[i]), support)
        assert (int(got.q[i]), float(got.d_nearest[i]), int(got.nearest[i])) == expected


@settings(max_examples=200, deadline=None)
@given(grids(), st.integers(1, 4), st.booleans())
def test_q_may_pass_over_invalid_rows(case: tuple[Support, Tensor, Tensor], t: int, leaves_out: bool) -> None:
    support, queries, y_hat = case
    exclude = torch.arange(len(queries)) % len(support) if leaves_out else None
    got = neighbourhood(queries, y_hat, support, exclude=exclude, passed_over=t)
    for i, query in enumerate(queries):
        left_out = None if exclude is None else int(exclude[i])
        expected = naive_q(query, int(y_hat[i]), support, left_out, passed_over=t)
        assert (int(got.q[i]), float(got.d_nearest[i]), int(got.nearest[i])) == expected


@settings(max_examples=100, deadline=None)
@given(grids())
def test_support_rows_leave_themselves_out_by_index(case: tuple[Support, Tensor, Tensor]) -> None:
    support, _, _ = case
    got = support_neighbourhood(support)
    for i, row in enumerate(support.h_prime):
        expected = naive_q(row, int(support.predictions[i]), support, exclude=i)
        assert (int(got.q[i]), float(got.d_nearest[i]), int(got.nearest[i])) == expected


def test_random_rows_against_the_plain_search() -> None:
    generator = torch.Generator().manual_seed(0)
    h_prime = torch.randn(400, 3, generator=generator) + 50
    labels = (h_prime[:, 0] > 50).long()
    predictions = torch.where(torch.rand(400, generator=generator) < 0.02, 1 - labels, labels)
    support = Support(h_prime, labels, predictions)
    queries = torch.randn(100, 3, generator=generator) + 50
    y_hat = (queries[:, 0] > 50).long()
    got = neighbourhood(queries, y_hat, support)
    expected = torch.tensor([naive_q(row, int(c), support)[0] for row, c in zip(queries, y_hat, strict=True)])
    assert torch.equal(got.q, expected)
    assert int(expected.max()) > 20  # otherwise the comparison says little


def test_hand_example() -> None:
    # On a line from 0: valid at 1, 2; invalid (mispredicted) at 3; valid at 4.
    support = Support(
        torch.tensor([[4.0], [2.0], [3.0], [1.0]]), torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 0, 1])
    )
    got = neighbourhood(torch.tensor([[0.0], [0.0], [3.6]]), torch.tensor([1, 0, 1]), support)
    assert got.q.tolist() == [2, 0, 1]
    assert got.d_nearest.tolist() == pytest.approx([1.0, 1.0, 0.16])
    assert got.nearest.tolist() == [3, 3, 0]


def test_without_an_invalid_row_all_valid_rows_count_and_a_cap_holds() -> None:
    support = Support(torch.arange(10.0).unsqueeze(1), torch.ones(10).long(), torch.ones(10).long())
    query, y_hat = torch.zeros(1, 1), torch.tensor([1])
    assert neighbourhood(query, y_hat, support).q.tolist() == [10]
    assert neighbourhood(query, y_hat, support, max_q=4).q.tolist() == [4]
    assert neighbourhood(query, y_hat, support, exclude=torch.tensor([3])).q.tolist() == [9]


def test_the_recorded_exclusion_drops_the_first_match_which_may_be_the_twin() -> None:
    # Rows 0 and 1 are twins; row 1 is mispredicted. By index row 1 leaves itself out and meets row 0;
    # by first match it drops row 0 and meets itself.
    support = Support(torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([1, 1, 1]), torch.tensor([1, 0, 1]))
    assert support_neighbourhood(support).nearest.tolist() == [1, 0, 0]
    assert support_neighbourhood(support, RECORDED).nearest.tolist() == [1, 1, 0]


def test_a_single_row_left_out_leaves_nothing() -> None:
    support = Support(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]))
    got = support_neighbourhood(support)
    assert (got.q.item(), got.d_nearest.item(), got.nearest.item()) == (0, float("inf"), -1)


@pytest.mark.parametrize("width", [1, 3, 100, 1000])
def test_a_row_has_the_same_distances_alone_and_in_any_batch(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    h_prime = torch.randn(777, width, generator=generator) + 3
    labels = torch.randint(0, 2, (777,), generator=generator)
    support = Support(h_prime, labels, labels.roll(1))
    queries = torch.randn(130, width, generator=generator) + 3
    y_hat = torch.randint(0, 2, (130,), generator=generator)
    whole = neighbourhood(queries, y_hat, support)
    for size in (1, 2, 3, 7, 16, 31, 64, 65, 129):
        for start in (0, 130 - size):
            part = slice(start, start + size)
            got = neighbourhood(queries[part], y_hat[part], support)
            assert torch.equal(got.d_nearest, whole.d_nearest[part])
            assert torch.equal(got.q, whole.q[part])
            assert torch.equal(got.nearest, whole.nearest[part])


def test_many_blocks_give_what_one_does() -> None:
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, 2, (3000,), generator=generator)
    support = Support(torch.randn(3000, 4, generator=generator), labels, labels)
    queries = torch.randn(3000, 4, generator=generator)
    y_hat = torch.randint(0, 2, (3000,), generator=generator)
    assert len(queries) * len(support) > BLOCK
    whole = neighbourhood(queries, y_hat, support)
    parts = [neighbourhood(queries[i : i + 300], y_hat[i : i + 300], support) for i in range(0, 3000, 300)]
    assert torch.equal(whole.q, torch.cat([part.q for part in parts]))
    assert torch.equal(whole.d_nearest, torch.cat([part.d_nearest for part in parts]))


def test_lower_matmul_precision_costs_time_not_exactness() -> None:
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(0, 2, (300,), generator=generator)
    support = Support(torch.randn(300, 64, generator=generator), labels, labels)
    queries, y_hat = torch.randn(40, 64, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    expected = neighbourhood(queries, y_hat, support)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = neighbourhood(queries, y_hat, support)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got.q, expected.q)
    assert torch.equal(got.d_nearest, expected.d_nearest)


def test_a_support_of_nothing_but_twins_is_all_in_doubt_and_still_exact() -> None:
    support = Support(torch.ones(2000, 8), torch.ones(2000).long(), torch.ones(2000).long())
    support.predictions[1500] = 0
    got = neighbourhood(torch.ones(3, 8), torch.tensor([1, 1, 0]), support)
    assert got.q.tolist() == [1500, 1500, 0]
    assert got.nearest.tolist() == [0, 0, 0]
