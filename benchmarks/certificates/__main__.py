"""Checks certificates of two-gate rules, and of regions, against a known truth: how many are false, how many issued.

    python -m benchmarks.certificates [--redraws 500] [--unbegun 0] [--whole 0] [--regions 0] [--only NAME] [--json]

Every redraw repeats the whole procedure with new data: records are dealt into fitting and certification, gate and
score fitted, order and start taken from cross-validated scores, and a certificate sought. The accuracy among those
let through is taken over 10,000 further records of a world in which it is known. A redraw *fails* where a certificate
was issued and the true accuracy is below it. At most a share delta may fail, up to sampling error. In `--unbegun`
redraws prompts tell something of the answers, and those whose score is foretold too low are not begun. `--whole` ones
are made by the steps of `candor calibrate`: with an SDM layer, whose figures the score may use, and with declared
strangers, which a probe learns to refuse; what it refuses depends on h. The papers' region uses the same records: a
layer on four fifths, its region certified on one fifth (`calibration.certificate`). These take longer. The exit code
is 1 where failures exceed delta beyond chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import trange

from benchmarks.certificates.world import WIDTH, World, as_answers
from candor.calibration.certificate import KINDS, Claim, certify
from candor.calibration.errors import CalibrationError
from candor.calibration.fit import FitSettings, fit, set_aside_for_certification
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share
from candor.calibration.rule import RuleRows, fit_rule
from candor.calibration.rule_certificate import RuleParts, certified_rule, certify_rule
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.served import Attempts
from candor.calibration.splits import draw, split
from candor.sdm.score import sdm_figures

FRESH = 10_000
PROMPT_WIDTH = 6
STRANGERS = 60
"""Declared ones; half of them teach the probe."""
MAY_LOSE = 0.02

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""n, generator -> h (n, WIDTH), labels (n,), P(y = 1 | h) (n,)."""


def top_not_rightest(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """P(right) is 0.985 where the first coordinate is in (0, 1.5), 0.85 above, 0.2 below."""
    h = torch.randn(n, WIDTH, generator=generator)
    truth = torch.where(h[:, 0] > 1.5, 0.85, torch.where(h[:, 0] > 0, 0.985, 0.2)).double()
    return h, (torch.rand(n, generator=generator) < truth).long(), truth


def near_ties(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Four distinct states of equal frequency, two of them 1e-6 apart; P(right) is 0.99, 0.96, 0.955 and 0.3."""
    level = torch.randint(4, (n,), generator=generator)
    h = torch.zeros(n, WIDTH)
    h[:, 0] = torch.tensor([2.0, 1.0, 1.0 - 1e-6, -1.0])[level]
    truth = torch.tensor([0.99, 0.96, 0.955, 0.3], dtype=torch.float64)[level]
    return h, (torch.rand(n, generator=generator) < truth).long(), truth


@dataclass(frozen=True)
class Draws:
    """records: total to fit and certify on. alpha: of the region."""

    name: str
    draw: Draw
    records: int
    wanted: Claim
    alpha: float


SCENARIOS = (
    Draws("balanced", World(0.5, 2.2).draw, 1_000, Claim(0.95, 0.05), 0.8),
    Draws("few wrong", World(0.85, 4.0, noise=0.01).draw, 1_000, Claim(0.97, 0.05), 0.7),
    Draws("few right", World(0.25, 4.0, noise=0.02).draw, 1_000, Claim(0.95, 0.05), 0.7),
    # No answer is right with probability above 1 - noise, so every certificate is just false.
    Draws("none true", World(0.85, 4.0, noise=0.03).draw, 1_000, Claim(0.97, 0.05), 0.7),
    Draws("top not rightest", top_not_rightest, 1_000, Claim(0.92, 0.05), 0.7),
    Draws("near-ties", near_ties, 1_000, Claim(0.96, 0.05), 0.7),
    Draws("300 records", World(0.75, 3.0).draw, 300, Claim(0.95, 0.05), 0.8),
)


@dataclass(frozen=True)
class RedrawCounts:
    """One redraw: whether a certificate was issued, whether it is false, and the share it lets through."""

    issued: bool
    false: bool
    answered: float


NOTHING = RedrawCounts(False, False, 0.0)


def redraw(scenario: Draws, seed: int, may_lose: float | None = None) -> RedrawCounts:
    """One redraw of a two-gate rule; its h is one block. Without `may_lose` prompts differ only by chance."""
    generator = torch.Generator().manual_seed(seed)
    telling = may_lose is not None
    rows, _ = _rows(scenario, scenario.records, generator, telling=telling)
    rest, apart = draw(rows.digests, 0.4, seed)
    fitting = rows[rest]
    _, half = split(list(fitting.digests), fitting.y.tolist(), (0.5, 0.5), seed)
    in_calibration = torch.zeros(len(fitting), dtype=torch.bool)
    in_calibration[half] = True
    try:
        settings = RuleSettings(seed=seed, may_lose=may_lose)
        fitted = fit_rule(fitting, in_calibration, (("last", WIDTH),), (PROMPT_WIDTH,), settings)
    except CalibrationError:
        return NOTHING
    found = certify_rule(fitted, rows[apart], scenario.wanted)
    if found.certificate is None:
        return NOTHING
    fresh, truth = _rows(scenario, FRESH, generator, telling=telling)
    judged = fitted.rule.judge(fresh.prompts, fresh.h, fresh.figures)
    answered = found.certificate.covers(judged.known, judged.score, judged.forecast)
    false = bool(answered.any()) and float(truth[answered].mean()) < scenario.wanted.accuracy
    return RedrawCounts(True, false, float(answered.double().mean()))


def redraw_whole(scenario: Draws, seed: int) -> RedrawCounts:
    """One redraw of a two-gate rule with the layer's figures and a probe, by calibration's own steps."""
    generator = torch.Generator().manual_seed(seed)
    pool = [replace(one, prompt_states=_prompts(one.h, generator)) for one in _answers(scenario, generator)]
    rest, apart = set_aside_for_certification(pool, 0.4, seed)
    strangers = torch.randn(STRANGERS, PROMPT_WIDTH, generator=generator)
    strangers[:, 1] += 2
    how = RuleParts(
        RuleSettings(seed=seed), (("last", WIDTH),), (PROMPT_WIDTH,), strangers, [None] * STRANGERS
    )
    try:
        fitted = fit(rest, ((WIDTH, "scalar"),), _layer(scenario, seed), lambda _: None)
        made = certified_rule(fitted, how, apart, {scenario.wanted.accuracy: scenario.wanted})
    except CalibrationError:
        return NOTHING
    certificate = made.searches[0].certificate
    if certificate is None:
        return NOTHING
    h, _, truth = scenario.draw(FRESH, generator)
    seen = fitted.estimator.measure(h)
    d, _, _ = fitted.estimator.activate(seen)
    judged = made.gates.rule.judge(_prompts(h, generator), h, sdm_figures(seen, d))
    answered = certificate.covers(judged.known, judged.score, judged.forecast)
    false = bool(answered.any()) and float(truth[answered].mean()) < scenario.wanted.accuracy
    return RedrawCounts(True, false, float(answered.double().mean()))


def redraw_region(scenario: Draws, seed: int) -> RedrawCounts:
    """One redraw of the papers' region, under the lower estimator."""
    generator = torch.Generator().manual_seed(seed)
    rest, apart = set_aside_for_certification(_answers(scenario, generator), 0.2, seed)
    try:
        fitted = fit(rest, ((WIDTH, "scalar"),), _layer(scenario, seed), lambda _: None)
    except CalibrationError:
        return NOTHING
    found = certify(fitted.estimator, fitted.calibration, apart, scenario.wanted)
    certificate = next((one for one in found.certificates if one.estimator == KINDS[0]), None)
    if certificate is None:
        return NOTHING
    h, y, truth = scenario.draw(4_000, generator)
    column = y.unsqueeze(1)
    none = torch.empty(len(h), 0)
    fresh = Attempts(fitted.estimator.measure(h), h, none, column, column >= 0, torch.zeros_like(column))
    served = fresh.served(fitted.estimator, scenario.alpha, KINDS[0])
    answered = served.answered & (served.q_prime >= certificate.rescaled_similarity_min)
    false = bool(answered.any()) and float(truth[answered].mean()) < scenario.wanted.accuracy
    return RedrawCounts(True, false, float(answered.double().mean()))


def _answers(scenario: Draws, generator: torch.Generator) -> list[Labelled]:
    return as_answers(*scenario.draw(scenario.records, generator)[:2], "record")


def _layer(scenario: Draws, seed: int) -> FitSettings:
    return FitSettings((scenario.alpha,), rounds=1, epochs=6, exemplar_dim=16, learning_rate=1e-2, seed=seed)


def _prompts(h: Tensor, generator: torch.Generator) -> Tensor:
    """Of h (..., WIDTH): (..., PROMPT_WIDTH), whose first two coordinates tell something of h."""
    drawn = torch.randn(*h.shape[:-1], PROMPT_WIDTH, generator=generator)
    drawn[..., :2] += h[..., :2]
    return drawn


def redraw_unbegun(scenario: Draws, seed: int) -> RedrawCounts:
    return redraw(scenario, seed, MAY_LOSE)


def _rows(scenario: Draws, n: int, generator: torch.Generator, *, telling: bool) -> tuple[RuleRows, Tensor]:
    """telling: prompts tell something of h."""
    h, y, truth = scenario.draw(n, generator)
    prompts = _prompts(h, generator) if telling else torch.randn(n, PROMPT_WIDTH, generator=generator)
    return RuleRows(prompts, h, torch.empty(n, 0), y, [str(i) for i in range(n)]), truth


def summarise(scenario: Draws, way: str, outcomes: list[RedrawCounts]) -> dict[str, Any]:
    issued = sum(one.issued for one in outcomes)
    failed = Share.from_counts(sum(one.false for one in outcomes), len(outcomes))
    assert failed.low is not None
    return {
        "scenario": scenario.name,
        "way": way,
        "records": scenario.records,
        "accuracy": scenario.wanted.accuracy,
        "delta": scenario.wanted.delta,
        "redraws": len(outcomes),
        "failed": failed.to_json(),
        "kept": failed.low <= scenario.wanted.delta,
        "issued": issued / len(outcomes),
        "answered_if_issued": sum(one.answered for one in outcomes) / max(1, issued),
    }


def main(
    redraws: Annotated[int, typer.Option(min=0, help="Of each scenario.")] = 500,
    unbegun: Annotated[int, typer.Option(min=0, help="Redraws of each that may lose some answers.")] = 0,
    whole: Annotated[int, typer.Option(min=0, help="Redraws of each with layer and probe.")] = 0,
    regions: Annotated[int, typer.Option(min=0, help="Redraws of each by the papers' region.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Scenarios by name; all without.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    rows = []
    ways: list[tuple[str, Callable[[Draws, int], RedrawCounts], int]] = [
        ("rule", redraw, redraws),
        ("unbegun", redraw_unbegun, unbegun),
        ("whole", redraw_whole, whole),
        ("region", redraw_region, regions),
    ]
    for scenario, (way, function, count) in product(SCENARIOS, ways):
        if not count or (only and scenario.name not in only):
            continue
        drawn = [function(scenario, seed) for seed in trange(count, desc=f"{scenario.name}, {way}")]
        rows.append(summarise(scenario, way, drawn))
        if not as_json:
            typer.echo(_line(rows[-1]))
    if as_json:
        typer.echo(json.dumps({"rows": rows, "kept": all(row["kept"] for row in rows)}))
    raise typer.Exit(0 if all(row["kept"] for row in rows) else 1)


def _line(row: dict[str, Any]) -> str:
    failed = [100 * row["failed"][name] for name in ("value", "low", "high")]
    return (
        "{scenario:<18}{way:<9}accuracy {accuracy:<6}".format(**row)
        + "failed {:.1f} % [{:.1f}, {:.1f}]   ".format(*failed)
        + "issued {issued:.0%}, answering {answered_if_issued:.0%}".format(**row)
    )


if __name__ == "__main__":
    typer.run(main)
