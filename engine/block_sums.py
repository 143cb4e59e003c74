"""Keeps sums of final hidden states per block of the KV cache.

The mean over all positions of a sequence needs the states of its prompt too, and with prefix caching most of
a prompt is not computed again. So the sums belong to the cache, not to the request: each physical block has
the sum of the final hidden states of the tokens whose keys and values it holds, and their count. A request
that is given a cached block is given its sum too. Then, for a sequence of n tokens in blocks B,

    mean = sum_{b in B} sum_b / n,        valid iff sum_{b in B} count_b = n,

The mean is exact under prefix caching, chunked prefill, batching, preemption and resumption; the count proves it.

All work runs on the states' device without synchronising with the host: it uses index arithmetic only and no
masks that would have to be counted. Padding rows go to one spare row.
"""

from __future__ import annotations

import torch


def bytes_of_sums(hidden_size: int) -> int:
    """Bytes of memory per block."""
    return (hidden_size + 1) * 4


class BlockSums:
    """Sum and count per block. Memory: `bytes_of_sums` for each of num_blocks + 1."""

    def __init__(self, num_blocks: int, block_size: int, hidden_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._spare = num_blocks
        self._sums = torch.zeros(num_blocks + 1, hidden_size, dtype=torch.float32, device=device)
        self._counts = torch.zeros(num_blocks + 1, dtype=torch.float32, device=device)

    def add(self, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        """Adds one step's rows.

        hidden: (rows, H), the final normed states of the step's tokens, any float type.
        slots: (rows,), the KV cache slot of each token: block * block_size + offset; negative: padding.
        A token at offset 0 clears the block's previous sum: the block is being reused.
        """
        slots = slots.long()
        block = torch.where(slots < 0, self._spare, slots // self.block_size)
        opens = (slots >= 0) & (slots % self.block_size == 0)
        cleared = torch.where(opens, block, self._spare)
        self._sums.index_fill_(0, cleared, 0.0)
        self._counts.index_fill_(0, cleared, 0.0)
        self._sums.index_add_(0, block, hidden.float())
        self._counts.index_add_(0, block, torch.ones_like(slots, dtype=torch.float32))

    def clear(self, blocks: torch.Tensor) -> None:
        """Clears the sums of `blocks` (b,), which will hold other tokens.

        `add` does not clear a block whose first tokens are not computed here. The count is then too low, which shows.
        """
        self._sums.index_fill_(0, blocks, 0.0)
        self._counts.index_fill_(0, blocks, 0.0)

    def mean(self, blocks: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (mean (H,), number of tokens counted ()) for a sequence of `positions` tokens in `blocks` (b,).

        The mean is exact iff all were counted. The caller checks this on the host; a check here would wait.
        """
        return self._sums[blocks].sum(0) / positions, self._counts[blocks].sum()
