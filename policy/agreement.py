"""How far two people agree who labelled the same answers.

kappa = (p_o - p_e) / (1 - p_e)     p_o: share on which they agree, p_e: what two such people would by chance
                                    (Cohen 1960)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """Counts of answers: both call it right, the first alone, the second alone, neither."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> Agreement:
        """Counts (first says right, second says right)."""
        seen = list(pairs)
        return cls(
            *(seen.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
        )

    @property
    def answers(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def share(self) -> float | None:
        """Share on which they agree, in [0, 1]; None without answers."""
        return (self.both + self.neither) / self.answers if self.answers else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, in [-1, 1]; None without answers, or where both say the same of all."""
        n = self.answers
        if not n:
            return None
        right, other = self.both + self.first, self.both + self.second
        by_chance = (right * other + (n - right) * (n - other)) / n**2
        if by_chance == 1:
            return None
        return ((self.both + self.neither) / n - by_chance) / (1 - by_chance)
