"""BlockSums against the sums taken one token at a time."""

from __future__ import annotations

import torch

from candor.engine.block_sums import BlockSums


def _mean(sums: BlockSums, blocks: list[int], positions: int) -> tuple[torch.Tensor, bool]:
    (total,) = sums.totals(torch.tensor(blocks), [len(blocks)])
    return total[:-1] / positions, int(total[-1]) == positions


def _slots(blocks: list[int], first: int, count: int, size: int) -> list[int]:
    return [blocks[p // size] * size + p % size for p in range(first, first + count)]


def test_chunks_of_two_sequences_in_one_step() -> None:
    torch.manual_seed(0)
    sums = BlockSums(8, 4, 3, torch.device("cpu"))
    a, b = torch.randn(10, 3), torch.randn(6, 3)
    blocks_a, blocks_b = [5, 0, 7], [2, 3]
    sums.add([torch.cat([a[:7], b[:3]])], torch.tensor(_slots(blocks_a, 0, 7, 4) + _slots(blocks_b, 0, 3, 4)))
    sums.add([torch.cat([b[3:], a[7:]])], torch.tensor(_slots(blocks_b, 3, 3, 4) + _slots(blocks_a, 7, 3, 4)))
    for blocks, rows in ((blocks_a, a), (blocks_b, b)):
        mean, complete = _mean(sums, blocks, len(rows))
        assert complete
        assert torch.allclose(mean, rows.mean(0), atol=1e-6)


def test_a_reused_block_forgets_what_it_held() -> None:
    sums = BlockSums(2, 4, 1, torch.device("cpu"))
    sums.add([torch.full((4, 1), 100.0)], torch.arange(4))
    sums.add([torch.ones(2, 1)], torch.arange(2))
    mean, complete = _mean(sums, [0], 2)
    assert complete
    assert mean.item() == 1.0


def test_a_missing_token_is_noticed() -> None:
    sums = BlockSums(2, 4, 1, torch.device("cpu"))
    sums.add([torch.ones(3, 1)], torch.arange(3))
    assert _mean(sums, [0], 3)[1]
    assert not _mean(sums, [0], 4)[1]
    assert not _mean(sums, [0, 1], 7)[1]


def test_padding_rows_go_nowhere() -> None:
    sums = BlockSums(2, 4, 1, torch.device("cpu"))
    sums.add([torch.tensor([[1.0], [7.0], [9.0]])], torch.tensor([0, 8, 8]))
    mean, complete = _mean(sums, [0], 1)
    assert complete
    assert mean.item() == 1.0
    assert not _mean(sums, [1], 1)[1]


def test_several_steps_and_several_sequences_at_once() -> None:
    torch.manual_seed(0)
    sums = BlockSums(4, 4, 3, torch.device("cpu"))
    rows = torch.randn(9, 3)
    sums.add(rows.split([5, 3, 1]), torch.tensor([4, 5, 6, 7, 12, 0, 1, 2, 13]))
    totals = sums.totals(torch.tensor([1, 3, 0]), [2, 1])
    assert torch.allclose(totals[:, :-1], torch.stack([rows[[0, 1, 2, 3, 4, 8]].sum(0), rows[5:8].sum(0)]))
    assert totals[:, -1].tolist() == [6, 3]
