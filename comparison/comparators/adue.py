"""AdUE: the classifier's head is tuned to predict its own mistakes (2505.15443).

From the frozen head theta_0, with e = 1 where the head's verdict is wrong and p = softmax(theta x):

    SM = (1/lambda) log sum_i exp(lambda p_i)          a smooth maximum
    U  = clip((1 - SM) / (1 - 1/C), 1e-8, 1 - 1e-8)
    L  = BCE(U, e) + a mean (U - U_SR)^2 + b |theta - theta_0|^2,      U_SR = (1 - max p_0) / (1 - 1/C)

It is trained on the training half for each of 27 settings; the highest ROC AUC of U on the calibration half wins.
1 - U is the probability that the verdict is right. The scale 1 - 1/C is not in the paper; without it U stays under
one half with two classes. Where SM >= 1 the clip has no gradient, so such rows have no effect on training.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from candor.calibration.evaluate import auroc
from candor.comparison.comparators.base import (
    Fitting,
    MethodVerdicts,
    Rows,
    Scorer,
    by_probability,
    linear_head,
)

LAMBDA = 100.0
EPOCHS, BATCH = 20, 128
LEARNING_RATES = (4e-4, 1e-4, 1e-5)
PULLS = tuple(product((0.01, 0.1, 1.0), (0.01, 0.1, 1.0)))
"""(a, b); they are trained in parallel, since their losses are independent."""


def fit(fitting: Fitting) -> Scorer:
    x, y_hat = fitting.train_rows.x.double(), fitting.train_rows.y_hat
    wrong = (y_hat != fitting.train_labels).double()
    seen = fitting.calibration_rows
    seen_x, seen_wrong = seen.x.double(), (seen.y_hat != fitting.calibration_labels).long()
    frozen = linear_head(fitting.estimator)
    best_auc, best = -math.inf, (frozen.weight.detach(), frozen.bias.detach())
    for learning_rate in LEARNING_RATES:
        for head in _train(fitting, x, wrong, learning_rate):
            auc = auroc(uncertainty(F.linear(seen_x, *head)), seen_wrong)
            if auc > best_auc:  # false where no calibration verdict is wrong: the frozen head stays
                best_auc, best = auc, head

    def score(rows: Rows) -> MethodVerdicts:
        return by_probability(rows.y_hat, 1 - uncertainty(F.linear(rows.x.double(), *best)), fitting.alphas)

    return score


def uncertainty(logits: Tensor) -> Tensor:
    """U (...) of logits (..., C), float64, because in float32 the upper clip rounds to 1."""
    smooth_maximum = torch.logsumexp(LAMBDA * logits.softmax(-1), dim=-1) / LAMBDA
    return ((1 - smooth_maximum) / (1 - 1 / logits.shape[-1])).clamp(1e-8, 1 - 1e-8)


def _train(fitting: Fitting, x: Tensor, wrong: Tensor, learning_rate: float) -> list[tuple[Tensor, Tensor]]:
    """A head (weight (C, D), bias (C,)) for each of `PULLS`, from rows x (n, D) and their mistakes (n,)."""
    frozen = linear_head(fitting.estimator).requires_grad_(False)
    before = (1 - frozen(x).softmax(1).amax(1)) / (1 - 1 / frozen.out_features)
    weight = frozen.weight.repeat(len(PULLS), 1, 1).requires_grad_()  # (g, C, D)
    bias = frozen.bias.repeat(len(PULLS), 1).requires_grad_()  # (g, C)
    a, b = torch.tensor(PULLS, dtype=torch.float64).T  # (g,) each
    generator = fitting.generator()
    optimiser = torch.optim.Adam([weight, bias], learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        learning_rate,
        total_steps=EPOCHS * math.ceil(len(x) / BATCH),
        pct_start=0.1,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=25,
        final_div_factor=1e4,
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            u = uncertainty(torch.einsum("nd,gcd->gnc", x[rows], weight) + bias.unsqueeze(1))  # (g, n)
            mistakes = F.binary_cross_entropy(u, wrong[rows].expand_as(u), reduction="none").mean(1)
            drift = (u - before[rows]).square().mean(1)
            moved = (weight - frozen.weight).square().sum((1, 2)) + (bias - frozen.bias).square().sum(1)
            loss = (mistakes + a * drift + b * moved).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return list(zip(weight.detach(), bias.detach(), strict=True))
