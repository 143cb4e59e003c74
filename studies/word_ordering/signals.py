"""What tells a row's right answers from its wrong ones before any SDM layer is fitted: ROC AUC of single numbers.

own verdict        log p(Yes) - log p(No) at the tag, (W_Yes - W_No) . h_t: what fine-tuning with negatives teaches
mean surprisal     of the answer's tokens, from the evidence
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from candor.calibration.evaluate import auroc
from candor.calibration.generate import Labelled, scorable
from candor.engine.base import EVIDENCE
from candor.engine.prompt import ChatFormat

MEAN_SURPRISAL = len(EVIDENCE) - EVIDENCE.index("log_mean_surprisal")


def signals(model: Path, own: Sequence[Labelled]) -> dict[str, float]:
    """own: answers whose h ends with the evidence."""
    seen = scorable(own)
    y = torch.tensor([answer.label for answer in seen])
    h = torch.stack([answer.h for answer in seen])
    return {
        "own verdict": auroc(h[:, : -len(EVIDENCE)] @ _yes_minus_no(model), y),
        "mean surprisal": auroc(-h[:, -MEAN_SURPRISAL], y),
    }


def _yes_minus_no(model: Path) -> Tensor:
    """(2H,): 0 for the mean half, the difference of the LM head's two rows for the state at the tag."""
    chat = ChatFormat.from_directory(model)
    yes, no = (chat.encode_continuation(word)[0] for word in ("Yes", "No"))
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        head = weights.get_slice(
            "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        )
        difference = (head[yes] - head[no]).float()
    return torch.cat([torch.zeros_like(difference), difference])
