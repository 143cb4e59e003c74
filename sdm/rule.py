"""Two gates in one rule: an answer is let through iff its prompt is known and its score reaches t.

    answered  iff  G (`sdm.gate`, at the end of prefill)  and  S >= t (`sdm.score`, at the answer's end)

A certificate covers this pair with its threshold (`calibration.rule_certificate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from candor.sdm.gate import PromptGate, require_names
from candor.sdm.score import AnswerScore


@dataclass(frozen=True, eq=False)
class RuleEstimate:
    """n rows. p_value (n,) float64 in (0, 1]; known, answered (n,) bool; score (n,), probability (n,) float32."""

    p_value: Tensor
    known: Tensor
    score: Tensor
    probability: Tensor
    answered: Tensor


@dataclass(frozen=True, eq=False)
class AnswerRule:
    """A prompt gate and an answer score. threshold: t, inf if nothing may be answered."""

    gate: PromptGate
    score: AnswerScore
    threshold: float

    def judge(self, prompts: Tensor, h: Tensor, figures: Tensor) -> RuleEstimate:
        """prompts (n, P), h (n, D), figures (n, F) -> the verdict on each row, a function of that row alone."""
        distance = self.gate.distance(prompts)
        known, score = self.gate.known(distance), self.score(prompts, h, figures)
        return RuleEstimate(
            self.gate.p_value(distance),
            known,
            score,
            self.score.probability(score),
            known & (score.double() >= self.threshold) & score.isfinite(),
        )

    def at(self, threshold: float) -> AnswerRule:
        """The same gates with another threshold."""
        return replace(self, threshold=threshold)

    def state(self) -> dict[str, Tensor]:
        """gate.*, score.* and threshold () float64; `from_state` restores it to the bit."""
        state = {f"gate.{name}": value for name, value in self.gate.state().items()}
        state |= {f"score.{name}": value for name, value in self.score.state().items()}
        return state | {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AnswerRule:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        groups: dict[str, dict[str, Tensor]] = {"gate": {}, "score": {}, "threshold": {}}
        for name, value in state.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        require_names("rule", {group: torch.empty(0) for group in groups}, {"gate", "score", "threshold"})
        require_names("threshold", groups["threshold"], {""})
        return cls(
            PromptGate.from_state(groups["gate"]),
            AnswerScore.from_state(groups["score"]),
            float(groups["threshold"][""]),
        )
