"""One forward pass of a batch: logits at the positions that predict targets, and h of every document.

    h = [ mean of the final normed states over positions 0..t ; that state at t ],   t the tag's last token

(arXiv 2510.26183, section 3; `engine.base`). Attention is causal, so the states up to t are those of the
document cut after its tag: one pass gives the loss and h. Logits are computed only at the learnt positions:
for small models the LM head is a large part of a step, and most positions are prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from candor.finetune.batches import Batch


class LearntPositions(nn.Module):
    """Wraps a causal language model for the trainer; it is a module, so that accelerate can wrap it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, with_logits: bool = True) -> tuple[Tensor | None, Tensor]:
        """Logits (T, V) float32 with gradient, or None; h (B, 2H) float32, a constant."""
        states = self.model.get_decoder()(
            input_ids=batch.ids, attention_mask=batch.attention, use_cache=False
        )[0]  # (B, L, H)
        h = summarise(states.detach(), batch.tag)
        if not with_logits:
            return None, h
        head = self.model.get_output_embeddings()
        return head(states.flatten(0, 1)[batch.predicting]).float(), h


def summarise(states: Tensor, tag: Tensor) -> Tensor:
    """states (B, L, H), tag (B,) -> h (B, 2H) float32."""
    positions = torch.arange(states.shape[1], device=states.device)
    counted = (positions <= tag.unsqueeze(1)).float()  # (B, L)
    mean = torch.einsum("bl,blh->bh", counted, states.float()) / counted.sum(1, keepdim=True)
    last = states[torch.arange(len(tag), device=tag.device), tag].float()
    return torch.cat([mean, last], dim=1)
