"""Drift without labels: whether prompts still lie as the calibration's did, from the gate's ranks alone.

The gate says of each prompt how many of its m reference prompts lie as far out: its bin k in 0..m. With the prompts
seen before counted into these bins, a prompt's rank among all of them is

    u = (those in bins farther out + references beyond + U (those in its own bin + 1)) / (m + n),  U uniform in (0, 1]

If the traffic is drawn as the reference was, the u are independent and uniform, exactly, whatever the gate: a small
reference makes no false alarm, as its own p-values do once the traffic is longer than it (Vovk's online conformal
p-values). Four bets, each with mean 1 under that, share a capital; after each prompt a hundredth of it is spread anew
(the simple jumper, Vovk et al. 2021, 2102.10439):

    2 - 2 u   prompts lie farther out        1 / (2 sqrt u)   a few lie very far out
    2 u       prompts lie nearer             1                nothing

    R_n = (1 + R_{n - 1}) capital_n / capital_{n - 1}        Shiryaev and Roberts

R_n - n is a martingale under no drift, so an alarm at R >= A comes falsely no more than once in A prompts, on
average. It says that prompts changed, not that answers are worse. The same prompt sent again and again is a change
too.
"""

from __future__ import annotations

import random
from math import log, log10

import numpy as np

PROMPTS_PER_FALSE_ALARM = 100_000
"""A: a false alarm comes no more than once in so many prompts, on average."""

_SPREAD = 0.01
_BETS = 4


class Drift:
    """The evidence that prompts changed, of one stream. references: m."""

    def __init__(self, references: int, seed: int | None = None) -> None:
        self._seen = np.zeros(references + 1, dtype=np.int64)  # by bin; bin 0 is farthest out
        self._references = references
        self._capital = np.full(_BETS, 1 / _BETS)
        self._log_r = -np.inf
        self._random = random.Random(seed)

    @property
    def evidence(self) -> float:
        """log10 of R, at least 0."""
        return max(0.0, float(self._log_r) / log(10))

    @property
    def threshold(self) -> float:
        """log10 of A."""
        return log10(PROMPTS_PER_FALSE_ALARM)

    @property
    def alarm(self) -> bool:
        """Whether R has reached A by now."""
        return self.evidence >= self.threshold

    def observe(self, p_value: float) -> None:
        """Takes the gate's p of one prompt, (1 + k) / (m + 1)."""
        m = self._references
        bin = min(m, max(0, round(p_value * (m + 1)) - 1))
        farther = int(self._seen[:bin].sum()) + bin
        ties = int(self._seen[bin])
        total = m + int(self._seen.sum()) + 1
        u = (farther + (1 - self._random.random()) * (ties + 1)) / total  # in (0, 1]
        self._seen[bin] += 1
        won = self._capital * np.array([2 - 2 * u, 2 * u, 0.5 / np.sqrt(u), 1.0])
        gain = float(won.sum())
        won /= gain
        self._capital = (1 - _SPREAD) * won + _SPREAD / _BETS
        self._log_r = np.logaddexp(0.0, self._log_r) + np.log(gain)
