"""A world with known truth: states are drawn by a formula, which gives the probability that an answer is right.

    s ~ Bernoulli(base_rate)      h | s ~ N((s - 1/2) separation u, I) in R^D, u = (1, ..., 1) / sqrt(D)
    y = s, flipped with probability noise

    P(y = 1 | h) = noise + (1 - 2 noise) sigmoid(logit(base_rate) + separation u.h)

So the accuracy among any answered rows is the mean of P(y = 1 | h) over fresh ones, without label noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from candor.calibration.generate import Labelled

WIDTH = 8


@dataclass(frozen=True)
class World:
    """base_rate in (0, 1); separation > 0; noise in [0, 0.5)."""

    base_rate: float
    separation: float
    noise: float = 0.0

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """h (n, WIDTH), labels (n,), P(y = 1 | h) (n,) float64."""
        s = torch.rand(n, generator=generator) < self.base_rate
        direction = torch.full((WIDTH,), 1 / sqrt(WIDTH))
        h = (s.float() - 0.5).unsqueeze(1) * self.separation * direction + torch.randn(
            n, WIDTH, generator=generator
        )
        odds = log(self.base_rate / (1 - self.base_rate)) + self.separation * (h @ direction).double()
        truth = self.noise + (1 - 2 * self.noise) * torch.sigmoid(odds)
        flipped = torch.rand(n, generator=generator) < self.noise
        return h, (s ^ flipped).long(), truth


def as_answers(h: Tensor, y: Tensor, name: str) -> list[Labelled]:
    """The rows as answers, each to its own prompt."""
    return [
        Labelled(f"{name}{i}", f"{name}{i}", (), "", 1 if label else 0, row)
        for i, (row, label) in enumerate(zip(h, y.tolist(), strict=True))
    ]
