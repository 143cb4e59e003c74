"""AbeT: an energy score with a temperature learnt as a function of the row (2401.12129).

    g_c = cos(w_c, x),   T = sigmoid(BN(a . x + b)) + 1e-12,   z = g / T,   trained by cross-entropy
    confidence = logsumexp(z)          the energy without the outer T that would cancel it

x is centred first, since the cosine of two uncentred states is always near one. The head is trained on the training
half; the epoch with the lowest cross-entropy on the calibration half is kept (early stopping, since the temperature
learns nothing without training errors). Every alpha has the same threshold, which admits the 95 % most confident of
the calibration half, the paper's acceptance rate. The verdict is argmax z.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_thresholds

EPOCHS, BATCH, LEARNING_RATE = 100, 128, 1e-2
ACCEPTED = 0.95


class AbeTHead(nn.Module):
    """x (n, D) float32 -> z (n, C). mean: (D,) of the training half."""

    mean: Tensor

    def __init__(self, mean: Tensor, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        dim = len(mean)
        self.register_buffer("mean", mean)
        self.prototypes = nn.Parameter(torch.randn(classes, dim, generator=generator) * dim**-0.5)
        self.temperature = nn.Linear(dim, 1)
        nn.init.uniform_(self.temperature.weight, -(dim**-0.5), dim**-0.5, generator=generator)
        nn.init.zeros_(self.temperature.bias)
        self.normalise = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        cosine = F.normalize(x) @ F.normalize(self.prototypes).T
        temperature: Tensor = self.normalise(self.temperature(x)).sigmoid() + 1e-12
        return cosine / temperature


def fit(fitting: Fitting) -> Scorer:
    x, y = fitting.train_rows.x, fitting.train_labels
    seen, seen_y = fitting.calibration_rows.x, fitting.calibration_labels
    generator = fitting.generator()
    head = AbeTHead(x.mean(0), int(y.max()) + 1, generator)
    optimiser = torch.optim.Adam(head.parameters(), LEARNING_RATE)
    best_loss, best = torch.inf, copy.deepcopy(head)
    for _ in range(EPOCHS):
        head.train()
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            if len(rows) == 1:  # batch normalisation needs a variance, which one row has not
                continue
            optimiser.zero_grad()
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            optimiser.step()
        head.eval()
        with torch.no_grad():
            loss = float(F.cross_entropy(head(seen), seen_y))
        if loss <= best_loss:
            best_loss, best = loss, copy.deepcopy(head)
    best.eval()

    @torch.no_grad()
    def judge(x: Tensor) -> tuple[Tensor, Tensor]:
        z = best(x)
        return z.argmax(1), z.double().logsumexp(1)

    threshold = float(judge(seen)[1].quantile(1 - ACCEPTED))

    def score(rows: Rows) -> MethodVerdicts:
        return by_thresholds(*judge(rows.x), dict.fromkeys(fitting.alphas, threshold))

    return score
