"""Next-token losses of a language model that carries an SDM layer (2510.26183, eq. 1).

At the position that predicts target y_t from logits z_t, in base beta > 1 and with distance d,

    l_t  = -log_beta softmax(d ln(beta) z_t)_{y_t},        loss = mean of l_t over unmasked targets.

`sdm_next_token_loss`: beta = 2 + SDM(z')_r, a constant of the document, in [2, 3], where r = 1 for a right
answer and 0 for a wrong one; d = 1. The gradient in z_t is (softmax(z_t ln beta) - onehot) / T, so a
document on which the layer is uncertain (small beta) keeps a larger residual.
`verification_loss`: beta = 2 + q and the layer's d at the one position that predicts Yes or No in the
verification tag; beta = e, d = 1 elsewhere (a newer option of the public code, without published results).
At beta = e, d = 1 the loss is cross-entropy.

The mean is over the targets of the given batch. The papers divide by the targets of the whole step; a
trainer that splits a step should weight its parts by their targets.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = -100
"""The label of a position that is not a target."""


def next_token_loss(
    logits: Tensor, labels: Tensor, log_base: Tensor | None = None, d: Tensor | None = None
) -> Tensor:
    """The loss above: a scalar, in the dtype of logits; 0 if no target is unmasked.

    logits: (B, L, V); those at t predict labels (B, L) at t + 1; `MASKED` labels don't count.
    log_base: ln(beta) > 0; d: in [0, 1]; either broadcasts to (B, L - 1), per predicting position,
    and is a constant. Both default to 1: cross-entropy.
    """
    targets = labels[:, 1:]
    ones = torch.ones(targets.shape, dtype=logits.dtype, device=logits.device)
    log_base = ones if log_base is None else log_base.detach().to(ones) * ones
    d = ones if d is None else d.detach().to(ones) * ones
    losses = token_losses(logits[:, :-1].flatten(0, 1), targets.flatten(), log_base.flatten(), d.flatten())
    return losses.sum() / (targets != MASKED).sum().clamp(min=1)


def token_losses(logits: Tensor, targets: Tensor, log_base: Tensor, d: Tensor | None = None) -> Tensor:
    """l_t of T predicting positions: logits (T, V), targets (T,), ln(beta) (T,) and d (T,) or 1 -> (T,)."""
    scale = log_base if d is None else d * log_base
    losses = F.cross_entropy(logits * scale.unsqueeze(1), targets, ignore_index=MASKED, reduction="none")
    return losses / log_base


def sdm_next_token_loss(logits: Tensor, labels: Tensor, sdm_at_reward: Tensor) -> Tensor:
    """sdm_at_reward: SDM(z')_r of each document, (B,), in [0, 1]. The rest is as in `next_token_loss`."""
    return next_token_loss(logits, labels, torch.log(2 + sdm_at_reward).unsqueeze(1))


def verification_loss(logits: Tensor, labels: Tensor, q: Tensor, d: Tensor, position: Tensor) -> Tensor:
    """q, d of each document: (B,); position: (B,) index in labels of the Yes/No token, or `MASKED` for
    none. The rest is as in `next_token_loss`."""
    predicting = (
        torch.arange(labels.shape[1] - 1, device=labels.device) == position.unsqueeze(1) - 1
    )  # (B, L - 1)
    log_base = torch.where(predicting, torch.log(2 + q).unsqueeze(1), 1.0)
    return next_token_loss(logits, labels, log_base, torch.where(predicting, d.unsqueeze(1), 1.0))
