"""Watches a certificate by audited answers, valid whenever one looks.

The certificate claims of the answers that it covers: P(right) >= a. Answer i is drawn for an audit (A_i = 1) with
probability pi_i, fixed before its label; X_i = 1 if it is right. Two processes bet against the two sides of a:

    alarm     M_n = sum_s v_s sum_j w_j prod_{s <= i <= n} (1 + l_j c_i A_i / pi_i (a - X_i))    against P(right) >= a
    renewal   likewise with (X_i - a)                                                            against P(right) <= a

    l_j = |a - p_j| / (a (1 - a)),  p_j below a for the alarm, above it for the renewal;  w_j equal
    c_i   the least pi that could have been drawn at i, known before i: it keeps every factor positive
    v_s   a prior over the answer at which the accuracy changed, 1 / log2(s + 1) - 1 / log2(s + 2); what begins later
          than n counts 1

Where all have the same pi, c_i / pi_i = 1, and the factors are the likelihood ratios (p_j / a)^X ((1 - p_j) /
(1 - a))^(1 - X). If P(right | past) >= a, the alarm is a supermartingale that begins at 1, so it ever reaches 1 /
delta with probability at most delta (Ville), however often one looks. Answers that were not drawn contribute 1. With
v_1 = 1 it is the plain mixture; the prior over changes costs little, and without it thousands of good labels have to
be used up before a fall can show (`benchmarks.monitor`).

A label may come late, in any order, or never. A drawn answer without one counts as right for the alarm and as wrong
for the renewal: each process is then at most what it would be with all labels, so neither the order of labelling nor
what reviewers skip can make a false alarm or a false renewal.

    upheld -> suspended    the alarm reached 1 / delta; both begin anew behind that answer
    upheld -> renewed      the renewal reached it: traffic itself shows the accuracy; the alarm goes on
    suspended -> renewed   likewise; a new alarm begins

Each alarm and each renewal that begins has its own delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
StandingName = Literal["upheld", "suspended", "renewed"]

_BELOW = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""a - p_j of the alarm."""
_ABOVE = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
"""(p_j - a) / (1 - a) of the renewal."""


class Audit(NamedTuple):
    """A drawn answer. probability: pi, in (0, 1]. least: the least pi possible there, in (0, probability]. correct:
    its label; None if there is none, yet or ever."""

    probability: float
    least: float
    correct: bool | None


@dataclass(frozen=True)
class Standing:
    """How a certificate stands after the audits so far.

    alarm, renewal: log10 of the evidence at the last label, of the runs that are going on; for a suspended one,
    alarm is what suspended it. threshold: log10 of 1 / delta, at which either is shown. right, wrong: audits with
    that label; open: without one. since: number of the audit, from 1, that changed it last; 0 if none did.
    """

    name: StandingName
    alarm: float
    renewal: float
    threshold: float
    right: int
    wrong: int
    open: int
    since: int = 0


def standing(audits: Sequence[Audit], accuracy: float, delta: float) -> Standing:
    """Returns the standing of a certificate of `accuracy` at confidence 1 - delta. audits: in the order of answers.

    Raises ValueError for an accuracy or delta outside (0, 1), or a pi that is out of range.
    """
    if not (0 < accuracy < 1 and 0 < delta < 1):
        raise ValueError(f"expected accuracy and delta in (0, 1), got {accuracy} and {delta}")
    if any(not 0 < one.least <= one.probability <= 1 for one in audits):
        raise ValueError("expected 0 < least <= probability <= 1 of each audit")
    weight = np.array([one.least / one.probability for one in audits], dtype=np.float64)  # (n,) in (0, 1]
    labelled = np.array([one.correct is not None for one in audits], dtype=bool)
    against_alarm = np.array([one.correct is not False for one in audits], dtype=bool)  # no label: right
    against_renewal = np.array([one.correct is True for one in audits], dtype=bool)  # no label: wrong
    falls, rises = weight * (accuracy - against_alarm), weight * (against_renewal - accuracy)
    last = int(labelled.nonzero()[0][-1]) + 1 if labelled.any() else 0
    threshold = -log(delta)

    name: StandingName = "upheld"
    begin = {"alarm": 0, "renewal": 0}
    since, suspending = 0, 0.0
    while True:
        alarm = log_evidence(falls[begin["alarm"] :], alarm_bets(accuracy))
        renewal = log_evidence(rises[begin["renewal"] :], renewal_bets(accuracy))
        fell = None if name == "suspended" else _reached(alarm, threshold, begin["alarm"])
        rose = None if name == "renewed" else _reached(renewal, threshold, begin["renewal"])
        if fell is not None and (rose is None or fell <= rose):
            suspending = float(alarm[fell - begin["alarm"]])
            name, since = "suspended", fell + 1
            begin = {"alarm": fell + 1, "renewal": fell + 1}
        elif rose is not None:
            if name == "suspended":
                begin["alarm"] = rose + 1
            name, since = "renewed", rose + 1
        else:
            break
    right = int(against_renewal.sum())
    return Standing(
        name=name,
        alarm=(suspending if name == "suspended" else _at(alarm, last - begin["alarm"])) / log(10),
        renewal=_at(renewal, last - begin["renewal"]) / log(10),
        threshold=threshold / log(10),
        right=right,
        wrong=int(labelled.sum()) - right,
        open=int((~labelled).sum()),
        since=since,
    )


def log_evidence(gains: Floats, bets: Floats, *, changes: bool = True) -> Floats:
    """Returns log M_1 .. log M_n (n,) of gains (n,), c_i / pi_i (a - X_i) or (X_i - a), under bets l_j (J,).

    changes: with the prior over where the accuracy changed; without, from the first answer on.
    """
    won = np.log1p(gains[:, None] * bets).cumsum(axis=0)  # (n, J)
    weight = -log(len(bets))
    if not changes or not len(gains):
        plain: Floats = np.logaddexp.reduce(won, axis=1) + weight
        return plain
    number = np.arange(1, len(gains) + 1)
    left = 1 / np.log2(number + 1)  # (n,): prior that it changes at n or later
    later = 1 / np.log2(number + 2)
    before = np.vstack([np.zeros(len(bets)), won[:-1]])
    begun = won + np.logaddexp.accumulate(np.log(left - later)[:, None] - before, axis=0)
    found: Floats = np.logaddexp(np.logaddexp.reduce(begun, axis=1) + weight, np.log(later))
    return found


def alarm_bets(accuracy: float) -> Floats:
    """Returns l_j (J,) of the alarm; for an accuracy too low for any p_j, one of half of it."""
    below = [gap for gap in _BELOW if gap < accuracy] or [accuracy / 2]
    return np.array(below) / (accuracy * (1 - accuracy))


def renewal_bets(accuracy: float) -> Floats:
    """Returns l_j (J,) of the renewal."""
    return np.array(_ABOVE) / accuracy


def _reached(path: Floats, threshold: float, begin: int) -> int | None:
    """Returns the index among all audits at which the path first reaches the threshold; None if it does not."""
    hits = (path >= threshold).nonzero()[0]
    return begin + int(hits[0]) if len(hits) else None


def _at(path: Floats, count: int) -> float:
    """Returns the path's value after `count` audits."""
    return float(path[count - 1]) if count > 0 else 0.0
