"""Drift of a served model's prompts: of all of them, and of each key's own (`candor.policy.drift`).

Where there is a store, a server begins with the prompts that are in it, of all replicas, and goes on with its own.
The lots that break ties are always the same, so the same prompts give the same evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from candor.policy.decision import Verdict
from candor.policy.drift import Drift

ALL = ""
"""In place of a key's name: all prompts together."""

_MOST_KEYS = 256
_SEED = 0


class PromptDrift:
    """references: of the gate. report: called with the key's name and the evidence, log10, after each prompt."""

    def __init__(self, references: int, report: Callable[[str, float], None]) -> None:
        self._references = references
        self._report = report
        self._streams = {ALL: Drift(references, _SEED)}
        report(ALL, 0.0)

    def recall(self, prompts: Iterable[tuple[float, str]]) -> None:
        """Takes earlier prompts, oldest first, each with its p and the name of the key that asked."""
        for p_value, caller in prompts:
            self._take(p_value, caller)

    def observe(self, verdict: Verdict, caller: str) -> None:
        """Takes the prompt of a judged answer. Give each prompt once, and none that departs from the policy."""
        if verdict.rule is not None:
            self._take(verdict.rule.prompt_p_value, caller)

    def _take(self, p_value: float, caller: str) -> None:
        for key in dict.fromkeys((ALL, caller)):  # a forgotten key's name is empty
            if key not in self._streams and len(self._streams) <= _MOST_KEYS:
                self._streams[key] = Drift(self._references, _SEED)
            if stream := self._streams.get(key):
                stream.observe(p_value)
                self._report(key, stream.evidence)
