"""The SDM activation: a softmax whose temperature depends on how well the training data covers the point.

    SDM(z')_i = exp(d ln(2 + q) z'_i) / sum_c exp(d ln(2 + q) z'_c)          (2509.12760, eq. 4)
    loss      = mean over rows of -log_{2+q} SDM(z')_y                       (2509.12760, eq. 7)

Base 2 + q is Similarity, exponent d is Distance, z' is Magnitude. At q = e - 2, d = 1 it is the softmax;
at d = 0 it is uniform; argmax is that of z' for d > 0. q and d are constants of the loss: its gradient
is d (SDM - onehot) / n, the change of base cancels, and q sets the temperature alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SOFTMAX_Q = float(torch.e) - 2.0
"""q at which 2 + q = e; with d = 1 the activation is the softmax (the first epoch of training)."""


def log_sdm(z_prime: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """ln SDM(z'): z' (n, C), q (n,) >= 0, d (n,) in [0, 1] -> (n, C) float64, finite for finite z'.

    In float64, so that the product d ln(2 + q) z' of float32 logits can't overflow, and so that one
    rounding to float32 at the end hides the order in which classes were summed.
    """
    scaled = z_prime.double() * (d.double() * torch.log(2 + q.double())).unsqueeze(1)
    return torch.log_softmax(scaled, dim=1)


def sdm(z_prime: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """SDM(z'): shapes as `log_sdm` -> (n, C) float32 in [0, 1], rows sum to 1."""
    return log_sdm(z_prime, q, d).exp().float()


def log_base_sdm(z_prime: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """log_{2+q} SDM(z'): (n, C) float64, <= 0."""
    return log_sdm(z_prime, q, d) / torch.log(2 + q.double()).unsqueeze(1)


def sdm_loss(z_prime: Tensor, q: Tensor, d: Tensor, labels: Tensor) -> Tensor:
    """Per-row loss -log_{2+q} SDM(z')_y: (n,), differentiable in z', in z's dtype.

    labels: (n,) int64 in 0..C-1. The papers' loss is its mean.
    """
    log_base = torch.log(2 + q)
    losses = F.cross_entropy(z_prime * (d * log_base).unsqueeze(1), labels, reduction="none")
    return losses / log_base


def sdm_loss_gradient(z_prime: Tensor, q: Tensor, d: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean of `sdm_loss` at z': (n, C), in z's dtype. It is d (SDM - onehot) / n."""
    activated = torch.softmax(z_prime * (d * torch.log(2 + q)).unsqueeze(1), dim=1)
    activated[torch.arange(len(labels)), labels] -= 1
    return activated * (d / len(labels)).unsqueeze(1)


def balanced_loss(losses: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class means of per-row losses: (n,), (n,) -> (C,) float64; an absent class counts 0.

    Their mean over classes is the criterion by which epochs and rounds are chosen.
    """
    totals = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, losses.double())
    return totals / torch.bincount(labels, minlength=num_classes).clamp(min=1)
