"""Before an answer is written: the score that it will probably have.

    F = weight . s + bias          s as in `sdm.gate`: the prompt's states at the end of prefill

A prompt whose F lies below the cut of a certificate (`policy.certificate`) hardly ever gets an answer whose score
reaches the certificate's threshold, so its answer need not be begun. The cut is a part of the certified rule.
F is correctly rounded (sdm/arithmetic.py). A row that isn't finite has F = -inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.arithmetic import LARGEST, RoundedLinear
from candor.sdm.gate import require_names, require_shapes


@dataclass(frozen=True, eq=False)
class ScoreForecast:
    """weight (P,) float32; bias () float32."""

    weight: Tensor
    bias: Tensor

    @cached_property
    def _linear(self) -> RoundedLinear:
        return RoundedLinear(self.weight.unsqueeze(0), self.bias.unsqueeze(0))

    def __call__(self, prompts: Tensor) -> Tensor:
        """F of prompt states (n, P), any float dtype: (n,) float32."""
        if prompts.dim() != 2 or prompts.shape[1] != len(self.weight):
            raise ValueError(f"prompt states must be (n, {len(self.weight)}), got {tuple(prompts.shape)}")
        s = prompts.float()
        finite = (s.abs() <= LARGEST).all(dim=1)  # also false for NaN
        return self._linear(s.where(finite.unsqueeze(1), 0.0)).squeeze(1).where(finite, -torch.inf)

    def state(self) -> dict[str, Tensor]:
        """Its fields; `from_state` restores it to the bit."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ScoreForecast:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        require_names("forecast", state, {field.name for field in fields(cls)})
        require_shapes("forecast", state, {"weight": (state["weight"].numel(),), "bias": ()})
        return cls(**state)
