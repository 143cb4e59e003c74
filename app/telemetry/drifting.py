"""Drift of a served model's prompts: of all of them, and of each key's own (`candor.policy.drift`)."""

from __future__ import annotations

from collections.abc import Callable

from candor.policy.decision import Verdict
from candor.policy.drift import Drift

ALL = ""
"""In place of a key's name: all prompts together."""

_MOST_KEYS = 256


class PromptDrift:
    """references: of the gate. report: called with the key's name and the evidence, log10, after each prompt."""

    def __init__(self, references: int, report: Callable[[str, float], None]) -> None:
        self._references = references
        self._report = report
        self._streams = {ALL: Drift(references)}
        report(ALL, 0.0)

    def observe(self, verdict: Verdict, caller: str) -> None:
        """Takes the prompt of a judged answer. Give each prompt once, and none that departs from the policy."""
        if verdict.rule is None:
            return
        for key in (ALL, caller):
            if key not in self._streams and len(self._streams) <= _MOST_KEYS:
                self._streams[key] = Drift(self._references)
            if stream := self._streams.get(key):
                stream.observe(verdict.rule.prompt_p_value)
                self._report(key, stream.evidence)
