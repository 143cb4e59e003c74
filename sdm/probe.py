"""A second look at prompts: are they of a kind that was declared strange?

    b     = weight . s                          log-odds of a declared stranger, up to a constant; s as in `sdm.gate`
    p     = (1 + #{reference b >= b}) / (m + 1)
    known iff  p > l / (m + 1)

The gate is unsupervised, so it doesn't see an instruction that is changed by a word: that hardly moves the states. A
regression between such prompts and the calibrated ones does (`calibration.gates.fit_probe`). Its cut comes from
records that fitted nothing, as the gate's does. So a declared kind is recognised as far as its states show it, and no
more than a stated share of the calibrated kind is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.arithmetic import LARGEST, RoundedLinear
from candor.sdm.gate import RankTest, require_names, require_shapes


@dataclass(frozen=True, eq=False)
class StrangerProbe(RankTest):
    """weight (P,) float32; reference (m,) float64, ascending; rank_cut () int64, l in 0..m."""

    weight: Tensor
    reference: Tensor
    rank_cut: Tensor

    @classmethod
    def fit(cls, weight: Tensor, reference: Tensor, rank_cut: int) -> StrangerProbe:
        """reference (m, P): states of records of the calibrated kind that fitted nothing."""
        bare = cls(weight.float(), torch.empty(0, dtype=torch.float64), torch.tensor(rank_cut))
        return cls(bare.weight, bare.distance(reference).sort().values, bare.rank_cut)

    @cached_property
    def _linear(self) -> RoundedLinear:
        return RoundedLinear(self.weight.unsqueeze(0), torch.zeros(1))

    def distance(self, states: Tensor) -> Tensor:
        """b of states (n, P), any float dtype: (n,) float64; inf for a row that isn't finite."""
        if states.dim() != 2 or states.shape[1] != len(self.weight):
            raise ValueError(f"prompt states must be (n, {len(self.weight)}), got {tuple(states.shape)}")
        x = states.float()
        finite = (x.abs() <= LARGEST).all(dim=1)  # also false for NaN
        b = self._linear(x.where(finite.unsqueeze(1), 0.0)).squeeze(1).double()
        return b.where(finite, torch.inf)

    def state(self) -> dict[str, Tensor]:
        """Its fields; `from_state` restores it to the bit."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> StrangerProbe:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        require_names("probe", state, {field.name for field in fields(cls)})
        require_shapes("probe", state, {"weight": (state["weight"].numel(),), "rank_cut": ()})
        return cls(**state)
