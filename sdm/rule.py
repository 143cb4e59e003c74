"""Two gates in one rule: an answer may be let through only if its prompt is known, and then by its score.

    known   G (`sdm.gate`, at the end of prefill), and where strangers were declared, also by the probe (`sdm.probe`)
    F       `sdm.forecast`, with the gate: what S will probably be; only where answers may be left unbegun
    S       `sdm.score`, at the answer's end

The thresholds that F and S must reach stand in a certificate (`policy.certificate`): without one, nothing is let
through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from candor.sdm.forecast import ScoreForecast
from candor.sdm.gate import PromptGate, require_names
from candor.sdm.probe import StrangerProbe
from candor.sdm.score import AnswerScore


@dataclass(frozen=True, eq=False)
class PromptEstimate:
    """n prompts. p_value (n,) float64 in (0, 1], of the gate; known (n,) bool; strange (n,) bool: the probe
    refuses it, so it is not known; forecast (n,) float32: F, inf where the rule has none."""

    p_value: Tensor
    known: Tensor
    strange: Tensor
    forecast: Tensor

    def row(self, row: int) -> PromptEstimate:
        """Of one prompt, counted from 0."""
        at = slice(row, row + 1)
        return PromptEstimate(*(getattr(self, field.name)[at] for field in fields(PromptEstimate)))

    @classmethod
    def joined(cls, some: Sequence[PromptEstimate]) -> PromptEstimate:
        """Of all prompts, in order."""
        return cls(*(torch.cat([getattr(one, field.name) for one in some]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class RuleEstimate(PromptEstimate):
    """n answers, with what is known of their prompts. score, probability (n,) float32."""

    score: Tensor
    probability: Tensor


@dataclass(frozen=True, eq=False)
class AnswerRule:
    """A prompt gate and an answer score. probe: where strangers were declared. forecast: where answers may be left
    unbegun."""

    gate: PromptGate
    score: AnswerScore
    probe: StrangerProbe | None = None
    forecast: ScoreForecast | None = None

    def judge(
        self, prompts: Tensor, h: Tensor, figures: Tensor, seen: PromptEstimate | None = None
    ) -> RuleEstimate:
        """prompts (n, P), h (n, D), figures (n, F) -> what is known of each row, a function of that row alone.

        seen: `know(prompts)`, where it was asked for when prefill ended.
        """
        score = self.score(prompts, h, figures)
        seen = self.know(prompts) if seen is None else seen
        prompt = {field.name: getattr(seen, field.name) for field in fields(PromptEstimate)}
        return RuleEstimate(**prompt, score=score, probability=self.score.probability(score))

    def know(self, prompts: Tensor) -> PromptEstimate:
        """prompts (n, P) -> what is known of each before it is answered."""
        distance = self.gate.distance(prompts)
        known, strange = self.gate.known(distance), torch.zeros(len(prompts), dtype=torch.bool)
        if self.probe is not None:
            strange = ~self.probe.known(self.probe.distance(prompts))
        forecast = torch.full((len(prompts),), torch.inf)
        if self.forecast is not None:
            forecast = self.forecast(prompts)
        return PromptEstimate(self.gate.p_value(distance), known & ~strange, strange, forecast)

    def state(self) -> dict[str, Tensor]:
        """gate.*, score.* and, if there are any, probe.*, forecast.*; `from_state` restores it to the bit."""
        parts = {"gate": self.gate.state(), "score": self.score.state()}
        if self.probe is not None:
            parts["probe"] = self.probe.state()
        if self.forecast is not None:
            parts["forecast"] = self.forecast.state()
        return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AnswerRule:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        groups: dict[str, dict[str, Tensor]] = {"gate": {}, "score": {}}
        for name, value in state.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        probe, forecast = groups.pop("probe", None), groups.pop("forecast", None)
        require_names("rule", {group: torch.empty(0) for group in groups}, {"gate", "score"})
        return cls(
            PromptGate.from_state(groups["gate"]),
            AnswerScore.from_state(groups["score"]),
            StrangerProbe.from_state(probe) if probe else None,
            ScoreForecast.from_state(forecast) if forecast else None,
        )
