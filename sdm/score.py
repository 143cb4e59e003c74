"""The second gate: the score of an answer, one linear function of its states and figures.

    S = weight . [prompt states ; h ; figures] + bias          figures: those of the SDM layer, `sdm_figures`
    P(y = 1) = sigmoid(slope S + intercept)

A weighted sum of several logistic regressions is linear again. A bundle therefore keeps, and an answer costs, only
one row of weights; `calibration.rule` finds it. S is correctly rounded (sdm/arithmetic.py), so an answer has the same
score alone and in a batch. A row that isn't finite has S = -inf and P = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.arithmetic import LARGEST, RoundedLinear
from candor.sdm.gate import require_names, require_shapes
from candor.sdm.outputs import Measurement

FIGURES = ("margin", "similarity", "distance_quantile", "logit")
"""Columns of `sdm_figures`."""


def sdm_figures(seen: Measurement, d: Tensor) -> Tensor:
    """The figures of a two-class layer for n rows, d (n,): (n, 4) float32.

    margin               z'_1 - z'_0
    similarity           ln(2 + q), negative where the verdict is 0
    distance_quantile    d
    logit                d ln(2 + q) (z'_1 - z'_0), the log-odds of SDM(z')_1
    """
    if seen.z_prime.shape[1] != 2:
        raise ValueError(
            f"a score speaks of right and wrong: expected 2 classes, got {seen.z_prime.shape[1]}"
        )
    margin = (seen.z_prime[:, 1].double() - seen.z_prime[:, 0].double()).where(seen.finite, 0.0)
    similarity = torch.log(2 + seen.q.double())
    signed = torch.where(seen.y_hat == 1, similarity, -similarity)
    return torch.stack([margin, signed, d.double(), d.double() * similarity * margin], dim=1).float()


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """weight (P + D + F,) float32, over prompt states, h, figures; bias () float32; slope, intercept () float64."""

    weight: Tensor
    bias: Tensor
    slope: Tensor
    intercept: Tensor

    @cached_property
    def _linear(self) -> RoundedLinear:
        return RoundedLinear(self.weight.unsqueeze(0), self.bias.unsqueeze(0))

    def __call__(self, prompts: Tensor, h: Tensor, figures: Tensor) -> Tensor:
        """S of prompt states (n, P), h (n, D) and figures (n, F), F = 0 or 4: (n,) float32."""
        x = torch.cat([prompts.float(), h.float(), figures.float()], dim=1)
        if x.shape[1] != len(self.weight):
            given = f"{prompts.shape[1]} + {h.shape[1]} + {figures.shape[1]}"
            raise ValueError(f"prompts, h and figures must be {len(self.weight)} wide together, got {given}")
        finite = (x.abs() <= LARGEST).all(dim=1)  # also false for NaN
        score = self._linear(x.where(finite.unsqueeze(1), 0.0)).squeeze(1)
        return score.where(finite, -torch.inf)

    def probability(self, score: Tensor) -> Tensor:
        """P(y = 1) of scores (n,): (n,) float32 in [0, 1]."""
        probability = torch.sigmoid(self.slope * score.double() + self.intercept).float()
        return probability.where(score > -torch.inf, 0.0)

    def state(self) -> dict[str, Tensor]:
        """Its fields; `from_state` restores it to the bit."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AnswerScore:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        require_names("score", state, {field.name for field in fields(cls)})
        width = state["weight"].numel()
        require_shapes("score", state, {"weight": (width,), "bias": (), "slope": (), "intercept": ()})
        return cls(**state)
