"""Which answers are audited: each is drawn by itself, with a probability that is kept and fixed before its label.

    share    pi = share for every answer
    doubt    pi = share sqrt(p (1 - p)) / its mean so far, for answers let through, within [share / 2, 1]

p is the calibrated probability that the answer is right. The second is the cheapest way to the same evidence, as far
as p is right (Neyman's allocation); whatever p is, the evidence stays valid, since pi is known.

Only an answer to its own prompt is a draw from the traffic: a pair that a client brought is none, and of several
choices for one prompt only the first is.
"""

from __future__ import annotations

import random
from math import sqrt
from typing import Literal

from candor.app.store.records import NEVER, Draw, GivenVerdict

AuditBy = Literal["share", "doubt"]

_LEAST = 0.5
"""Least pi, as a part of the share: a rare draw must not weigh so much that no bet can be placed."""
_SLOW = 500
"""Answers over which the mean doubt is taken."""


class Drawing:
    """share: of answers that are audited, in [0, 1]."""

    def __init__(self, share: float, by: AuditBy = "share", seed: int | None = None) -> None:
        self.share = share
        self.by = by
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()
        self._doubt = 0.0
        self._seen = 0

    def draw(self, given: GivenVerdict) -> Draw:
        """Returns whether the answer is drawn, and with which probability."""
        if given.kind == "pair" or given.index > 0 or not self.share:
            return NEVER
        p = given.verdict.probability
        probability = least = self.share
        if self.by == "doubt" and p is not None and not given.verdict.abstained:
            probability, least = self._by_doubt(sqrt(max(p * (1 - p), 0.0))), self.share * _LEAST
        return Draw(probability, least, self._random.random() < probability)

    def _by_doubt(self, doubt: float) -> float:
        # The mean is that of earlier answers, so pi depends on nothing that comes later.
        mean = self._doubt or doubt
        self._seen = min(self._seen + 1, _SLOW)
        self._doubt += (doubt - self._doubt) / self._seen
        wanted = self.share * doubt / mean if mean else self.share
        return min(1.0, max(self.share * _LEAST, wanted))
