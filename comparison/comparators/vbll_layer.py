"""VBLL: a variational Bayesian last layer on x (Harrison, Willes and Snoek, 2404.11599), by the authors' library.

The discriminative layer with a diagonal covariance is trained on the training half by its evidence bound (weight of
the prior 1/N). The epoch with the best likelihood on the calibration half is kept. The predictive probability is
the mean of the softmax over 200 draws of the logits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from vbll.layers.classification import DiscClassification

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_classes

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 100, 128, 1e-3, 1e-4
DRAWS = 200


def fit(fitting: Fitting) -> Scorer:
    x, y = fitting.train_rows.x, fitting.train_labels
    seen, seen_y = fitting.calibration_rows.x, fitting.calibration_labels
    with torch.random.fork_rng(devices=[]):  # the library draws from the global generator
        torch.manual_seed(fitting.seed)
        layer = DiscClassification(x.shape[1], int(y.max()) + 1, 1 / len(x), parameterization="diagonal")
        optimiser = torch.optim.AdamW(layer.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        best_loss, best = torch.inf, layer.state_dict()
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimiser.zero_grad()
                layer(x[rows]).train_loss_fn(y[rows]).backward()
                torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
                optimiser.step()
            loss = float(F.nll_loss(_predictive(layer, seen, fitting.seed).log(), seen_y))
            if loss <= best_loss:
                best_loss, best = loss, copy.deepcopy(layer.state_dict())
        layer.load_state_dict(best)

    def score(rows: Rows) -> MethodVerdicts:
        return by_classes(_predictive(layer, rows.x, fitting.seed), fitting.alphas)

    return score


@torch.no_grad()
def _predictive(layer: DiscClassification, x: Tensor, seed: int) -> Tensor:
    """(n, C) float64. The layer gives the logits' distribution; a row's draws don't depend on the batch."""
    logits = layer.logit_predictive(x)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(DRAWS, 1, logits.mean.shape[1], generator=generator, dtype=torch.float64)
    drawn: Tensor = logits.mean.double() + noise * logits.covariance_diagonal.double().sqrt()
    return drawn.softmax(2).mean(0).clamp(1e-12, 1 - 1e-12)
