"""Two gates in one rule: an answer may be let through only if its prompt is known, and then by its score.

    known   G (`sdm.gate`, at the end of prefill)
    S       `sdm.score`, at the answer's end

The threshold that S must reach stands in a certificate (`policy.certificate`): without one, nothing is let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.sdm.gate import PromptGate, require_names
from candor.sdm.score import AnswerScore


@dataclass(frozen=True, eq=False)
class RuleEstimate:
    """n rows. p_value (n,) float64 in (0, 1]; known (n,) bool; score (n,), probability (n,) float32."""

    p_value: Tensor
    known: Tensor
    score: Tensor
    probability: Tensor


@dataclass(frozen=True, eq=False)
class AnswerRule:
    """A prompt gate and an answer score."""

    gate: PromptGate
    score: AnswerScore

    def judge(self, prompts: Tensor, h: Tensor, figures: Tensor) -> RuleEstimate:
        """prompts (n, P), h (n, D), figures (n, F) -> the verdict on each row, a function of that row alone."""
        distance = self.gate.distance(prompts)
        score = self.score(prompts, h, figures)
        return RuleEstimate(
            self.gate.p_value(distance), self.gate.known(distance), score, self.score.probability(score)
        )

    def state(self) -> dict[str, Tensor]:
        """gate.* and score.*; `from_state` restores it to the bit."""
        state = {f"gate.{name}": value for name, value in self.gate.state().items()}
        return state | {f"score.{name}": value for name, value in self.score.state().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AnswerRule:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        groups: dict[str, dict[str, Tensor]] = {"gate": {}, "score": {}}
        for name, value in state.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        require_names("rule", {group: torch.empty(0) for group in groups}, {"gate", "score"})
        return cls(PromptGate.from_state(groups["gate"]), AnswerScore.from_state(groups["score"]))
