"""Checks certificates against a known truth: how many are false, how many are issued, what they let through.

    python -m benchmarks.certificates [--redraws 500] [--json]

Every redraw repeats the whole procedure with new data: a layer is trained on its own halves, its region found,
thresholds ordered on the calibration half and a certificate sought on fresh records. The accuracy among the answered
is taken over 4,000 further records of a world where it is known (`benchmarks.certificates.world`). A redraw *fails*
where a certificate was issued and the true accuracy is below it. At most a share delta may fail, up to sampling
error. The table also shows a choice by eye: the loosest threshold at which the calibration half itself keeps the
accuracy. The exit code is 1 where failures exceed delta beyond chance.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import trange

from benchmarks.certificates.world import WIDTH, World, as_answers
from candor.calibration.certificate import KINDS, Claim, certify, thresholds
from candor.calibration.fit import FitSettings, fit
from candor.calibration.intervals import Share
from candor.calibration.served import Attempts, ServedRows

FITTED, CERTIFIED, FRESH = 400, 1_000, 4_000
"""Numbers of records to fit on, to certify on, and to compute the truth from."""


@dataclass(frozen=True)
class Scenario:
    """alpha: the region's alpha."""

    name: str
    world: World
    alpha: float
    wanted: Claim


SCENARIOS = (
    Scenario("balanced", World(0.5, 2.2), 0.8, Claim(0.95, 0.05)),
    Scenario("few wrong", World(0.85, 4.0, noise=0.01), 0.7, Claim(0.97, 0.05)),
    Scenario("few right", World(0.25, 4.0, noise=0.02), 0.7, Claim(0.96, 0.05)),
    # No answer is right with probability above 1 - noise, so every certificate is just false.
    Scenario("few wrong, none true", World(0.85, 4.0, noise=0.03), 0.7, Claim(0.97, 0.05)),
)


@dataclass(frozen=True)
class RedrawOutcome:
    """One redraw under one estimator: whether a certificate was issued and whether it is false; the same for the
    choice by eye; the share answered within the certified region."""

    issued: bool
    false: bool
    by_eye: bool
    by_eye_false: bool
    answered: float


def redraw(scenario: Scenario, seed: int) -> dict[str, RedrawOutcome]:
    """The outcomes by estimator. Where no region is found, no certificate is issued."""
    generator = torch.Generator().manual_seed(seed)
    world, wanted, alpha = scenario.world, scenario.wanted, scenario.alpha
    settings = FitSettings((alpha,), rounds=1, epochs=6, exemplar_dim=16, learning_rate=1e-2, seed=seed)
    pool = as_answers(*world.draw(FITTED, generator)[:2], "fit")
    fitted = fit(pool, ((WIDTH, "scalar"),), settings, lambda _: None)
    region = fitted.estimator.regions[alpha]
    if not region.found:
        return {kind: RedrawOutcome(False, False, False, False, 0.0) for kind in KINDS}
    apart = as_answers(*world.draw(CERTIFIED, generator)[:2], "certify")
    found = certify(fitted.estimator, fitted.calibration, apart, wanted)
    h, y, truth = world.draw(FRESH, generator)
    known = Attempts.measure(fitted.estimator, fitted.calibration)
    column = y.unsqueeze(1)
    fresh = Attempts(fitted.estimator.measure(h), column, column >= 0, torch.zeros_like(column))
    outcomes: dict[str, RedrawOutcome] = {}
    for one in found.sought:
        served = fresh.served(fitted.estimator, alpha, one.estimator)
        threshold = one.certificate.rescaled_similarity_min if one.certificate else None
        seen = known.served(fitted.estimator, alpha, one.estimator)
        by_eye = _by_eye(seen, thresholds(seen, region.q_prime_min), wanted.accuracy)
        outcomes[one.estimator] = RedrawOutcome(
            threshold is not None,
            _is_false(served, truth, threshold, wanted.accuracy),
            by_eye is not None,
            _is_false(served, truth, by_eye, wanted.accuracy),
            0.0 if threshold is None else float(_answered(served, threshold).double().mean()),
        )
    return outcomes


def _answered(served: ServedRows, threshold: float) -> Tensor:
    return served.answered & (served.q_prime >= threshold)


def _is_false(served: ServedRows, truth: Tensor, threshold: float | None, accuracy: float) -> bool:
    if threshold is None:
        return False
    answered = _answered(served, threshold)
    return bool(answered.any()) and float(truth[answered].mean()) < accuracy


def _by_eye(seen: ServedRows, order: tuple[float, ...], accuracy: float) -> float | None:
    for threshold in reversed(order):
        answered = _answered(seen, threshold)
        if answered.any() and float((seen.y[answered] == 1).double().mean()) >= accuracy:
            return threshold
    return None


def summarise(scenario: Scenario, redraws: int) -> list[dict[str, Any]]:
    """A row for each estimator."""
    drawn = [redraw(scenario, seed) for seed in trange(redraws, desc=scenario.name)]
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        outcomes = [one[kind] for one in drawn]
        failed = Share.from_counts(sum(one.false for one in outcomes), redraws)
        assert failed.low is not None
        rows.append(
            {
                "scenario": scenario.name,
                **asdict(scenario.world),
                "alpha": scenario.alpha,
                "accuracy": scenario.wanted.accuracy,
                "delta": scenario.wanted.delta,
                "estimator": kind,
                "redraws": redraws,
                "failed": failed.to_json(),
                "kept": failed.low <= scenario.wanted.delta,
                "issued": sum(one.issued for one in outcomes) / redraws,
                "answered_if_issued": sum(one.answered for one in outcomes)
                / max(1, sum(one.issued for one in outcomes)),
                "by_eye_issued": sum(one.by_eye for one in outcomes) / redraws,
                "by_eye_failed": sum(one.by_eye_false for one in outcomes) / redraws,
            }
        )
    return rows


def main(
    redraws: Annotated[int, typer.Option(min=1, help="Of each scenario.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    rows = [row for scenario in SCENARIOS for row in summarise(scenario, redraws)]
    if as_json:
        typer.echo(json.dumps({"rows": rows, "kept": all(row["kept"] for row in rows)}))
    else:
        for row in rows:
            typer.echo(_line(row))
    raise typer.Exit(0 if all(row["kept"] for row in rows) else 1)


def _line(row: dict[str, Any]) -> str:
    failed = [100 * row["failed"][name] for name in ("value", "low", "high")]
    return (
        "{scenario:<22}{estimator:<7}accuracy {accuracy:<6}delta {delta:<6}".format(**row)
        + "failed {:.1f} % [{:.1f}, {:.1f}]   ".format(*failed)
        + "issued {issued:.0%}, answering {answered_if_issued:.0%}   ".format(**row)
        + "by eye: {by_eye_failed:.0%} false of {by_eye_issued:.0%}".format(**row)
    )


if __name__ == "__main__":
    typer.run(main)
