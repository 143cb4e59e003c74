"""Simulates how soon audits notice that a certificate no longer holds, and how often they say so falsely.

    python -m benchmarks.monitor [--runs 500] [--out docs/results/monitoring.md]

Answers are covered by a certificate of 95 % with delta 5 %. Each has a probability p that says of itself how sure it
is; the errors 1 - p are Gamma(1/2), so some answers are far more doubtful than others, and real errors are p's,
scaled to the true accuracy. Audited are all, one in five at random, or one in five by doubt (`app.store.drawing`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from candor.policy.drift import PROMPTS_PER_FALSE_ALARM, Drift
from candor.policy.monitor import alarm_bets, log_evidence, renewal_bets

A, DELTA = 0.95, 0.05
THRESHOLD = -log(DELTA)
USUAL = 0.97
"""Mean of the answers' own probabilities."""
SHARE = 0.2

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Labels:
    """Audited answers in order. weight: least pi / pi. right: labels. answer: which answer each was, from 1."""

    weight: Floats
    right: Floats
    answer: NDArray[np.int64]


def own_errors(rng: np.random.Generator, answers: int) -> Floats:
    return np.minimum(rng.gamma(0.5, (1 - USUAL) / 0.5, answers), 0.5)


MEAN_ERROR = float(own_errors(np.random.default_rng(0), 10_000_000).mean())


def world(rng: np.random.Generator, accuracy: float, answers: int) -> tuple[Floats, Floats]:
    """Returns the answers' own doubt sqrt(p (1 - p)) and whether each is right."""
    errors = own_errors(rng, answers)
    right = rng.random(answers) >= np.minimum(errors * (1 - accuracy) / MEAN_ERROR, 1)
    return np.sqrt(errors * (1 - errors)), right.astype(float)


def audited(rng: np.random.Generator, way: str, accuracy: float, labels: int) -> Labels:
    """Draws about that many audited answers. way: "all", "one in five" or "by doubt"."""
    share = 1.0 if way == "all" else SHARE
    doubt, right = world(rng, accuracy, round(labels / share))
    probability, least = np.full(len(doubt), share), share
    if way == "by doubt":
        mean = np.concatenate([doubt[:1], (np.cumsum(doubt) / np.arange(1, len(doubt) + 1))[:-1]])
        probability, least = np.clip(share * doubt / mean, share / 2, 1), share / 2
    drawn = (rng.random(len(doubt)) < probability).nonzero()[0]
    return Labels(least / probability[drawn], right[drawn], drawn + 1)


def first(path: Floats) -> int | None:
    """Returns the label, counted from 0, at which the evidence reaches 1 / delta."""
    hits = (path >= THRESHOLD).nonzero()[0]
    return int(hits[0]) if len(hits) else None


def alarm(seen: Labels, *, changes: bool = True) -> int | None:
    return first(log_evidence(seen.weight * (A - seen.right), alarm_bets(A), changes=changes))


def renewal(seen: Labels) -> int | None:
    return first(log_evidence(seen.weight * (seen.right - A), renewal_bets(A)))


def said(found: list[tuple[int, int] | None]) -> str:
    """(labels, answers) of each run as "median (nine in ten) labels; median answers"."""
    labels = np.array([np.inf if one is None else one[0] for one in found])
    answers = np.array([np.inf if one is None else one[1] for one in found])
    # Order statistics: an interpolation between a run that alarmed and one that did not has no value.
    at = [np.quantile(labels, q, method="higher") for q in (0.5, 0.9)]
    middle = np.quantile(answers, 0.5, method="higher")
    shown = ["not in the run" if np.isinf(value) else f"{value:,.0f}" for value in (*at, middle)]
    return f"{shown[0]} ({shown[1]}); {shown[2]}"


def until(
    runs: int, way: str, accuracy: float, labels: int, look: Callable[[Labels], int | None], seed: int
) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for run in range(runs):
        seen = audited(np.random.default_rng([seed, run]), way, accuracy, labels)
        at = look(seen)
        found.append(None if at is None else (at + 1, int(seen.answer[at])))
    return found


WAYS = ("all", "one in five", "by doubt")
ROOM = {0.93: 12_000, 0.90: 4000, 0.85: 2000, 0.70: 500, 0.97: 8000, 0.98: 4000, 0.99: 2000}


def tables(runs: int) -> Iterable[str]:
    yield "| truth | audited: all | one in five | one in five, by doubt |"
    yield "|---|---|---|---|"
    for accuracy in (0.93, 0.90, 0.85, 0.70):
        cells = [said(until(runs, way, accuracy, ROOM[accuracy], alarm, 1)) for way in WAYS]
        yield f"| alarm at {accuracy:.2f} | {' | '.join(cells)} |"
    for accuracy in (0.97, 0.98, 0.99):
        cells = [said(until(runs, way, accuracy, ROOM[accuracy], renewal, 2)) for way in WAYS]
        yield f"| renewal at {accuracy:.2f} | {' | '.join(cells)} |"
    yield ""
    runs *= 4
    yield f"| at the edge, truth 0.95, {runs:,} runs of 3,000 labels | all | one in five | by doubt |"
    yield "|---|---|---|---|"
    for name, look in (("false alarms", alarm), ("false renewals", renewal)):
        cells = []
        for way in WAYS:
            hits = sum(one is not None for one in until(runs, way, A, 3000, look, 3))
            cells.append(f"{hits} ({hits / runs:.1%})")
        yield f"| {name} | {' | '.join(cells)} |"
    runs //= 4
    yield ""
    yield "| 3,000 labels at 0.98, then | with the prior over changes | the plain mixture |"
    yield "|---|---|---|"
    for accuracy in (0.90, 0.85, 0.70):
        yield f"| {accuracy:.2f} | {fallen(runs, accuracy, True)} | {fallen(runs, accuracy, False)} |"
    yield ""
    yield "| fresh, audited all | with the prior over changes | the plain mixture |"
    yield "|---|---|---|"
    for accuracy in (0.93, 0.90, 0.85, 0.70):
        plain = until(runs, "all", accuracy, ROOM[accuracy], lambda seen: alarm(seen, changes=False), 1)
        with_prior = until(runs, "all", accuracy, ROOM[accuracy], alarm, 1)
        yield f"| {accuracy:.2f} | {said(with_prior)} | {said(plain)} |"
    yield ""
    yield "| truth 0.98, 5,000 answers | counted as if a sample | its accuracy | alarms |"
    yield "|---|---|---|---|"
    yield from complaints(runs)


def fallen(runs: int, accuracy: float, changes: bool) -> str:
    """Labels after the fall until the alarm; audited all. Alarms before it are counted."""
    found: list[tuple[int, int] | None] = []
    early = 0
    for run in range(runs):
        rng = np.random.default_rng([4, run])
        right = np.concatenate([world(rng, 0.98, 3000)[1], world(rng, accuracy, 6000)[1]])
        at = alarm(Labels(np.ones(len(right)), right, np.arange(1, len(right) + 1)), changes=changes)
        early += at is not None and at < 3000
        if at is None or at >= 3000:
            found.append(None if at is None else (at - 2999, at - 2999))
    return f"{said(found).rpartition(';')[0]}" + (f"; {early} before it" if early else "")


def complaints(runs: int) -> Iterable[str]:
    """A thumb that complains: three in ten wrong answers get one, and one in a hundred right ones."""
    rows: dict[str, list[tuple[float, bool]]] = {"thumbs": [], "audits, one in twenty": []}
    for run in range(runs):
        rng = np.random.default_rng([5, run])
        _, right = world(rng, 0.98, 5000)
        for name, chance in (
            ("thumbs", np.where(right == 1, 0.01, 0.3)),
            ("audits, one in twenty", np.full(5000, 0.05)),
        ):
            drawn = (rng.random(5000) < chance).nonzero()[0]
            seen = Labels(np.ones(len(drawn)), right[drawn], drawn + 1)
            rows[name].append((float(seen.right.mean()), alarm(seen) is not None))
    for name, found in rows.items():
        accuracy = np.mean([one for one, _ in found])
        yield f"| | {name} | {accuracy:.2f} | {sum(alarmed for _, alarmed in found)} of {runs} |"


def drifts(runs: int) -> Iterable[str]:
    yield "| prompts | alarm after (median, nine in ten) | of runs |"
    yield "|---|---|---|"
    for name, far, shift, prompts in (
        ("as the calibration's, 20,000 of them", 0.0, 0.0, 20_000),
        ("one in twenty from elsewhere", 0.05, 0.0, 3000),
        ("one in ten from elsewhere", 0.1, 0.0, 3000),
        ("three in ten from elsewhere", 0.3, 0.0, 3000),
        ("all half a deviation farther out", 0.0, 0.5, 3000),
        ("all a deviation farther out", 0.0, 1.0, 3000),
    ):
        found = [drift(np.random.default_rng([6, run]), far, shift, prompts) for run in range(runs)]
        alarms = np.array([np.inf if one is None else one for one in found])
        at = [np.quantile(alarms, q, method="higher") for q in (0.5, 0.9)]
        shown = ["none" if np.isinf(value) else f"{value:,.0f}" for value in at]
        yield f"| {name} | {shown[0]} ({shown[1]}) | {np.isfinite(alarms).sum()} of {runs} |"


def drift(rng: np.random.Generator, far: float, shift: float, prompts: int) -> int | None:
    """300 references; 1,000 usual prompts first, unless nothing changes."""
    before = 1000 if far or shift else 0
    reference = np.sort(rng.normal(size=300))
    x = rng.normal(size=before + prompts)
    x[before:] = np.where(rng.random(prompts) < far, 5.0, x[before:] + shift)
    one = Drift(300, int(rng.integers(1 << 30)))
    at_least = 300 - np.searchsorted(reference, x, side="left")
    for number, p in enumerate((1 + at_least) / 301, start=1):
        one.observe(float(p))
        if one.alarm and number > before:
            return number - before
    return None


TEXT = f"""# Watching a certificate

Made by `python -m benchmarks.monitor`, {{runs}} runs a cell (drift: {{few}}). The certificate claims 95 % with delta
5 %; evidence is looked at after every label (`policy/monitor.py`).

## Labels until it shows

*labels in the median (in nine of ten runs); answers given meanwhile in the median*

{{tables}}

- Drawn by doubt, an alarm needs fewer labels, the fewer the smaller the fall, where p is right about which answers
  are doubtful. Where it is not, the evidence is still valid. A renewal far above the edge needs more: bets have to
  stay small enough for the rarest draw.
- Without the prior over changes, a fall after 3,000 good labels is found five to ten times later: they have to be
  used up first. With it, a fall on the first day is found about as soon.
- Thumbs are no sample: who complains chose the answer because it was wrong. Counted as one, they end a certificate
  that holds with three points to spare.

## Drift of prompts, without labels

At most one false alarm in {PROMPTS_PER_FALSE_ALARM:,} prompts on average; 300 reference prompts, 1,000 usual prompts
before the change (`policy/drift.py`).

{{drifts}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    few = max(1, given.runs // 10)
    text = TEXT.format(
        runs=given.runs, few=few, tables="\n".join(tables(given.runs)), drifts="\n".join(drifts(few))
    )
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
