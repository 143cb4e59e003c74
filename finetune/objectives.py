"""The losses at a learnt position with logits z (V,) and target y, p = softmax(z).

    ce     -log p(y)
    sdm    -log_beta softmax(z ln beta)(y),     beta = 2 + SDM(z')_r of the document     (finetune.loss)
    ual    -sum_v [(1 - e) 1(v = y) + e / V] log p(v),     e of the document             (2406.04854)
    first  KL(P_T || p restricted to the teacher's five),  P_T the teacher's, recalibrated   (2408.12168)

Each function returns one loss per position; the trainer divides their sum by the targets of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from candor.finetune.loss import token_losses


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (T, V), targets (T,) -> (T,)."""
    return token_losses(logits, targets, torch.ones(len(targets), device=logits.device))


def sdm_loss(logits: Tensor, targets: Tensor, sdm_at_reward: Tensor) -> Tensor:
    """sdm_at_reward: SDM(z')_r of each target's document, (T,) in [0, 1]."""
    return token_losses(logits, targets, torch.log(2 + sdm_at_reward))


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
    """smoothing: e of each target's document, (T,) in [0, 1]."""
    log_p = F.log_softmax(logits, dim=1)  # (T, V)
    at_target = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return -(1 - smoothing) * at_target - smoothing * log_p.mean(dim=1)


def distillation(logits: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """ids (T, 5): tokens; teacher (T, 5): their recalibrated probabilities, each row summing to 1. The
    student's are normalised over the same five by a softmax of their logits."""
    log_p = F.log_softmax(logits.gather(1, ids), dim=1)
    return F.kl_div(log_p, teacher, reduction="none").sum(dim=1)
