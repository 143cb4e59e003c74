"""Keeps sums of final hidden states per block of the KV cache.

The mean over all positions of a sequence needs the states of its prompt too, and with prefix caching most of
a prompt is not computed again. So the sums belong to the cache, not to the request: each physical block has
the sum of the final hidden states of the tokens whose keys and values it holds, and their count. A request
that is given a cached block is given its sum too. Then, for a sequence of n tokens in blocks B,

    mean = sum_{b in B} sum_b / n,        valid iff sum_{b in B} count_b = n,

The mean is exact under prefix caching, chunked prefill, batching, preemption and resumption; the count proves it.

All work runs on the states' device without synchronising with the host: it uses index arithmetic only and no
masks that would have to be counted. Padding rows go to one spare row. On a GPU a small operation costs its launch and
nothing else, so there are few of them, whatever the number of rows, steps and sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bytes_of_sums(hidden_size: int) -> int:
    """Bytes of memory per block."""
    return (hidden_size + 1) * 4


class BlockSums:
    """Sum and count per block. Memory: `bytes_of_sums` for each of num_blocks + 1."""

    def __init__(self, num_blocks: int, block_size: int, hidden_size: int, device: torch.device) -> None:
        self._spare = num_blocks
        self._block_size = block_size
        # The count is the sum of a column of ones.
        self._sums = torch.zeros(num_blocks + 1, hidden_size + 1, dtype=torch.float32, device=device)

    def add(self, hidden: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """Adds the rows of one or more steps.

        hidden: (rows, H) of each step, the final normed states of its tokens, float32.
        places: (all rows,), the KV cache slot of each token: block * block_size + offset; padding: num_blocks *
        block_size. A token at offset 0 clears the block's previous sum: the block is being reused.
        """
        block = places // self._block_size
        opened = torch.where(places % self._block_size == 0, block, self._spare)
        self._sums.index_fill_(0, opened, 0.0)
        rows = self._sums.new_ones((len(places), self._sums.shape[1]))
        torch.cat(list(hidden), out=rows[:, :-1])
        self._sums.index_add_(0, block, rows)

    def clear(self, blocks: torch.Tensor) -> None:
        """Clears the sums of `blocks` (b,), which will hold other tokens.

        `add` does not clear a block whose first tokens are not computed here. The count is then too low, which shows.
        """
        self._sums.index_fill_(0, blocks, 0.0)

    def totals(self, blocks: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Returns (n, H + 1), sum and count of n sequences. blocks: (b,), those of the first, then of the next, ...;
        counts: how many each has.

        The sum over the number of positions is the exact mean iff as many were counted. The caller checks this on
        the host; a check here would wait.
        """
        return torch.stack([some.sum(0) for some in self._sums[blocks].split(list(counts))])
