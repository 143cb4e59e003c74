"""Laws of the split, over drawn groups, labels and shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from candor.calibration.splits import draw, split

RECORDS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), max_size=60)
SHARES = st.sampled_from([(1.0,), (0.5, 0.5), (0.4, 0.4, 0.2), (0.9, 0.1)])
SEEDS = st.integers(0, 2**31)


@given(RECORDS, SHARES, SEEDS)
def test_every_record_in_one_part_and_no_group_in_two(
    records: list[tuple[int, int]], shares: tuple[float, ...], seed: int
) -> None:
    groups = [group for group, _ in records]
    parts = split(groups, [label for _, label in records], shares, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(records)))
    owners = [{groups[index] for index in part.tolist()} for part in parts]
    assert sum(len(owner) for owner in owners) == len(set(groups))


@given(st.lists(st.integers(0, 2), max_size=80), SHARES, SEEDS)
def test_single_records_are_stratified_to_within_one(
    labels: list[int], shares: tuple[float, ...], seed: int
) -> None:
    parts = split(range(len(labels)), labels, shares, seed)
    for label in set(labels):
        for share, part in zip(shares, parts, strict=True):
            have = sum(labels[index] == label for index in part.tolist())
            assert abs(have - share * labels.count(label)) < 1


@given(RECORDS, SHARES, SEEDS)
def test_the_same_arguments_give_the_same_parts(
    records: list[tuple[int, int]], shares: tuple[float, ...], seed: int
) -> None:
    groups, labels = [group for group, _ in records], [label for _, label in records]
    first, second = split(groups, labels, shares, seed), split(groups, labels, shares, seed)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_another_seed_gives_other_parts() -> None:
    # 100 records can be halved in C(100, 50) = 1e29 ways: equal parts by chance do not happen.
    a, b = (split(range(100), [0] * 100, (0.5, 0.5), seed)[0] for seed in (0, 1))
    assert not a.equal(b)


def test_a_large_group_goes_first_and_small_ones_even_it_out() -> None:
    # Six records of one prompt and six alone: halves of six each are possible, and found for any seed.
    groups = [0] * 6 + [1, 2, 3, 4, 5, 6]
    for seed in range(20):
        assert [len(part) for part in split(groups, [0] * 12, (0.5, 0.5), seed)] == [6, 6]


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.5, -0.5), (1.0, 0.0)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive and sum to 1"):
        split([0, 1], [0, 1], shares, 0)


def test_groups_and_labels_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        split([0, 1], [0], (1.0,), 0)


def test_a_draw_takes_whole_groups_at_random_whatever_their_labels_and_sizes() -> None:
    groups = [i // 3 if i < 30 else i for i in range(130)]  # ten of three, a hundred of one
    rest, drawn = draw(groups, 0.2, seed=1)
    assert sorted([*rest.tolist(), *drawn.tolist()]) == list(range(130))
    assert not {groups[i] for i in rest} & {groups[i] for i in drawn}
    assert len({groups[i] for i in drawn}) == 22
    assert draw(groups, 0.2, seed=1)[1].equal(drawn)
    assert not draw(groups, 0.2, seed=2)[1].equal(drawn)


def test_every_group_is_as_likely_to_be_drawn() -> None:
    """A group of ten beside 19 of one: in 1,000 draws of 5 groups of 20, each in a quarter; 4 standard errors."""
    groups = [0] * 10 + list(range(1, 20))
    counts = torch.zeros(20)
    for seed in range(1000):
        counts[torch.tensor([groups[i] for i in draw(groups, 0.25, seed)[1].tolist()]).unique()] += 1
    assert (counts / 1000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 1000) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        draw([1, 2, 3], share, 0)
