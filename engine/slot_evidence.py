"""Keeps each generated token's evidence in the KV cache slot of its predecessor.

The position that predicts a token gives its surprisal and its margin (engine/evidence.py). Both are kept for every
slot of the KV cache together with the token. The reader compares the tokens, so evidence that another request left
in a shared block, or of a token that was sampled and dropped, is never taken for this answer's.
The features are computed at the end, when it is known which tokens are the answer.

Only the read at an answer's end waits for the host or grows with the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MOST_MARGIN = 1000.0
"""Far beyond any model's; a margin has to be finite."""
ROWS_AT_ONCE = 4
"""Rows of logits computed together on a CPU. They stay in its caches: twice as fast as all rows at once."""


def bytes_of_evidence(block_size: int) -> int:
    """Bytes of memory per block."""
    return block_size * 12


class SlotEvidence:
    """Token, surprisal and margin per slot. Memory: `bytes_of_evidence` for each of num_blocks, and one slot."""

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self._slots = num_blocks * block_size
        self._block_size = block_size
        # token (exact in float32 below 2^24), surprisal, margin
        self._kept = torch.full((self._slots + 1, 3), -1.0, device=device)

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Returns `slots` (rows,) with the last place, which is no slot's, for -1, vLLM's padding."""
        return slots % (self._slots + 1)

    def clear(self, places: torch.Tensor) -> None:
        """Clears `places` (rows,), which now hold other tokens."""
        self._kept.index_fill_(0, places, -1.0)

    def clear_blocks(self, blocks: torch.Tensor) -> None:
        """Clears all slots of `blocks` (b,)."""
        self._kept[: self._slots].view(-1, self._block_size, 3).index_fill_(0, blocks, -1.0)

    def write(self, places: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Stores evidence. places, tokens: (n,). logits: (n, V), the model's own at those places, any float type."""
        measured = surprisal_and_margin(logits, tokens.long())
        self._kept.index_copy_(0, places, torch.cat([tokens.float().unsqueeze(1), measured], 1))

    def read(self, places: torch.Tensor) -> torch.Tensor:
        """Returns (n, 3): token, surprisal and margin at `places` (n,)."""
        return self._kept[places]


def predecessors(blocks: Sequence[int], block_size: int, first: int, positions: int) -> list[int]:
    """Slots of the tokens before those from position `first` to `positions`, of a sequence in `blocks`."""
    return [blocks[p // block_size] * block_size + p % block_size for p in range(first - 1, positions - 1)]


def surprisal_and_margin(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns (n, 2) float32, -log p(token) and log p(token) - max of the others, from logits (n, V), tokens (n,).

    With m the margin, the token's logit less the largest other one o, and r = log sum_{v != token} exp(x_v - o):
    -log p = log(1 + exp(r - m)), which stays precise if the token's probability is near 1. -r is the largest
    log-softmax among the others. Where a grammar leaves no other token, the surprisal is 0 and m is MOST_MARGIN.
    """
    at_once = ROWS_AT_ONCE if logits.device.type == "cpu" else max(1, len(logits))
    measured = []
    for some, token in zip(logits.split(at_once), tokens.split(at_once), strict=True):
        rows, column = some.to(torch.float32, copy=True), token.unsqueeze(1)
        own = rows.gather(1, column)  # (b, 1)
        rows.scatter_(1, column, -torch.inf)
        margin = (own - rows.amax(1, keepdim=True)).clamp_max(MOST_MARGIN)
        best = torch.log_softmax(rows, 1).amax(1, keepdim=True).nan_to_num()  # of no other: not a number
        measured.append(torch.cat([torch.nn.functional.softplus(-(best + margin)), margin], 1))
    return torch.cat(measured) if measured else logits.new_zeros((0, 2), dtype=torch.float32)


def of_answer(kept: torch.Tensor, answer: Sequence[int]) -> tuple[list[float], list[float]] | None:
    """(surprisals, margins) of the answer's tokens from the result of `read`; None if its tokens differ."""
    kept = kept[: len(answer)]
    if kept[:, 0].tolist() != list(answer):
        return None
    return kept[:, 1].tolist(), kept[:, 2].tolist()
