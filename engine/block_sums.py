"""Sums of final hidden states, kept per block of the KV cache.

The mean over all positions of a sequence needs the states of its prompt too, and with prefix caching most of
a prompt is not computed again. So what is kept belongs to the cache, not to the request: for every physical
block, the sum of the final hidden states of the tokens whose keys and values lie in it, and how many
they are. Whoever is given the block is given its sum. Then, for a sequence of n tokens in blocks B,

    mean = sum_{b in B} sum_b / n,        valid iff sum_{b in B} count_b = n,

exact under prefix caching, chunked prefill, batching, preemption and resumption; the count proves it.

All of it happens on the states' device without asking the host: index arithmetic only, no masks that
would have to be counted, and rows that belong nowhere go to one spare row.
"""

from __future__ import annotations

import torch


def bytes_of_sums(hidden_size: int) -> int:
    """Memory of one block."""
    return (hidden_size + 1) * 4


class BlockSums:
    """Memory: `bytes_of_sums` for each of num_blocks + 1."""

    def __init__(self, num_blocks: int, block_size: int, hidden_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._spare = num_blocks
        self._sums = torch.zeros(num_blocks + 1, hidden_size, dtype=torch.float32, device=device)
        self._counts = torch.zeros(num_blocks + 1, dtype=torch.float32, device=device)

    def add(self, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        """Adds one step's rows.

        hidden: (rows, H), the final normed states of the step's tokens, any float type.
        slots: (rows,), where each token's keys and values lie: block * block_size + offset; negative: padding.
        The first token of a block that is used anew clears what the block held before.
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
        """Forgets what was kept for `blocks` (b,): other tokens will lie there.

        Nobody else does where the first of them are not computed here: then too few are counted, and it shows.
        """
        self._sums.index_fill_(0, blocks, 0.0)
        self._counts.index_fill_(0, blocks, 0.0)

    def mean(self, blocks: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean (H,), how many tokens were counted ()) for a sequence of `positions` tokens in `blocks` (b,).

        The mean is exact iff all of them were counted; whoever has both on the host looks (it would wait here).
        """
        return self._sums[blocks].sum(0) / positions, self._counts[blocks].sum()
