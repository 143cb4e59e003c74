"""Two gates on one task, beside today's rule and a logistic regression, over five deals.

    python -m studies.two_gates var/gates/demo --accuracy 0.95 --accuracy 0.98

FOLDER holds calibration.pt, test.pt and further sets (`studies.two_gates.answers`), such as shifted.pt, ood.pt, and
strangers' by any name. Every deal sets records aside for the certificate, fits a layer and the rule on the rest, and
is looked at on each set. The ways are all certified at the same accuracy and delta:

    two gates     the rule, 40 % of the records to certify on
    unbegun       the same, where answers whose prompts promise too little are not begun (`MAY_LOSE`)
    score alone   the same score, no gate
    logistic      a logistic regression on all of h, no gate, the same records and certificate
    today         SDM_HR lower: its region's certificate, 20 % of the records to certify on
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from candor.calibration.certificate import Claim, certify
from candor.calibration.ranking import probabilistic, rms_calibration
from candor.calibration.rule import FittedRule, RuleRows, fit_rule, with_probabilities
from candor.calibration.rule_certificate import ceiling, certify_rule
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.served import Attempts
from studies.two_gates.answers import Answered, load
from studies.two_gates.deals import Deal, layer, rows

DELTA = 0.05
MAY_LOSE = 0.02

Outcome = dict[str, Any]


def open_gate(fitted: FittedRule) -> FittedRule:
    """The same rule whose gate knows every prompt."""
    gate = replace(fitted.rule.gate, rank_cut=torch.tensor(0))
    return replace(fitted, rule=replace(fitted.rule, gate=gate), known=torch.ones_like(fitted.known))


def looked_at(answered: Tensor, known: Tensor, y: Tensor, accuracy: float) -> Outcome:
    right = int((y[answered] == 1).sum())
    share, base = float(answered.double().mean()), float((y == 1).double().mean())
    most = ceiling(base, accuracy)
    return {
        "answered": share,
        "accuracy": right / int(answered.sum()) if answered.any() else None,
        "known": float(known.double().mean()),
        "of_ceiling": share / most if most else None,
    }


def off_by(probability: Tensor, y: Tensor) -> dict[str, float | None]:
    """ECE of the probability that the answer is right, and RMS calibration error; None without answers."""
    if not len(y):
        return {"ece": None, "rms": None}
    once, one_bin = torch.ones(1, len(y), dtype=torch.float64), torch.zeros_like(y)
    error = probabilistic(once, probability.double(), one_bin, y == 1)["top_label_ece"]
    return {"ece": float(error), "rms": rms_calibration(probability, y == 1, 0)[0]}


def by_rule(
    fitted: FittedRule, apart: RuleRows, sets: dict[str, RuleRows], accuracies: Sequence[float]
) -> dict[float, Outcome]:
    found, served = {}, with_probabilities(fitted, apart)
    for accuracy in accuracies:
        made = certify_rule(fitted, apart, Claim(accuracy, DELTA))
        outcome: Outcome = {"issued": made.certificate is not None, "chosen": fitted.chosen}
        outcome |= {"certified": made.answered, "horizon": made.horizon}
        for name, some in sets.items():
            judged = served.judge(some.prompts, some.h, some.figures)
            through = torch.zeros_like(judged.known)
            if made.certificate:
                through = made.certificate.covers(judged.known, judged.score, judged.forecast)
            outcome[name] = looked_at(through, judged.known, some.y, accuracy)
            if made.certificate and made.certificate.forecast_min is not None:
                begun = made.certificate.promising(judged.forecast)
                would = judged.known & (judged.score.double() >= made.certificate.score_min)
                outcome[name]["unbegun"] = float((judged.known & ~begun).double().mean())
                outcome[name]["lost"] = float((~begun)[would].double().mean())
            scored = judged.score.isfinite()
            outcome[name] |= off_by(judged.probability[scored], some.y[scored])
        found[accuracy] = outcome
    return found


def by_today(
    deal: Deal, answered: Answered, sets: dict[str, Answered], accuracies: Sequence[float]
) -> dict[float, Outcome]:
    estimator = deal.estimator.with_regions((0.9, 0.95))
    labelled = answered.labelled()
    half = [labelled[i] for i in deal.fitting[deal.in_calibration].tolist()]
    apart = [labelled[i] for i in deal.certification.tolist()]
    measured = {name: Attempts.measure(estimator, some.labelled()) for name, some in sets.items()}
    found = {}
    for accuracy in accuracies:
        made = certify(estimator, half, apart, Claim(accuracy, DELTA)).certificates
        lower = [one for one in made if one.estimator == "lower"]
        best = max(lower, key=lambda one: one.answered, default=None)
        outcome: Outcome = {"issued": best is not None}
        if best is not None:
            outcome["certified"] = best.answered / best.records
        for name, attempts in measured.items():
            y = attempts.y.squeeze(1)
            through = torch.zeros(len(y), dtype=torch.bool)
            if best is not None:
                served = attempts.served(estimator, best.alpha, "lower")
                through = served.answered & (served.q_prime >= best.rescaled_similarity_min)
            outcome[name] = looked_at(through, torch.ones_like(through), y, accuracy)
        found[accuracy] = outcome
    return found


def deal_of(
    folder: Path, seed: int, names: Sequence[str], accuracies: Sequence[float], settings: RuleSettings
) -> dict[str, dict[float, Outcome]]:
    """By way and accuracy."""
    known = load(folder / "calibration.pt")
    sets = {name: load(folder / f"{name}.pt") for name in names}
    hidden = known.prompts.shape[1] // 2
    parts = (("mean", hidden), ("last", hidden), ("evidence", known.h.shape[1] - 2 * hidden))
    deal = layer(known, seed, folder, 0.9)
    fitting = rows(known, deal.estimator, deal.fitting)
    usable = fitting.h.isfinite().all(1)
    apart = rows(known, deal.estimator, deal.certification)
    seen = {name: rows(some, deal.estimator) for name, some in sets.items()}
    widths = (hidden, hidden)

    def fitted(score: str | None) -> FittedRule:
        how = replace(settings, score=score, may_lose=MAY_LOSE)
        return fit_rule(fitting[usable], deal.in_calibration[usable], parts, widths, how)

    foretold = fitted(settings.score)
    rule, logistic = (replace(one, forecasts=None) for one in (foretold, fitted("all")))
    return {
        "two gates": by_rule(rule, apart, seen, accuracies),
        "unbegun": by_rule(foretold, apart, seen, accuracies),
        "score alone": by_rule(open_gate(rule), apart, seen, accuracies),
        "logistic": by_rule(open_gate(logistic), apart, seen, accuracies),
        "today": by_today(layer(known, seed, folder, 0.9, share=0.2), known, sets, accuracies),
    }


def table(deals: Sequence[dict[str, dict[float, Outcome]]], names: Sequence[str]) -> list[str]:
    """Markdown: means over deals; a deal without a certificate answers nothing."""

    def mean(values: Sequence[float | None]) -> str:
        kept = [value for value in values if value is not None]
        return f"{100 * sum(kept) / len(kept):.1f}" if kept else "-"

    lines = []
    for accuracy in deals[0]["two gates"]:
        lines += [
            f"wanted {accuracy}, delta {DELTA}, {len(deals)} deals: answered % (right %), of the ceiling %",
            "",
            "| way | no certificate | " + " | ".join(names) + " |",
            "|---" * (2 + len(names)) + "|",
        ]
        for way in deals[0]:
            outcomes = [deal[way][accuracy] for deal in deals]
            cells = []
            for name in names:
                per = [one[name] for one in outcomes]
                cell = f"{mean([one['answered'] for one in per])} ({mean([one['accuracy'] for one in per])})"
                if any(one["of_ceiling"] for one in per):
                    cell += f", {mean([one['of_ceiling'] for one in per])}"
                if "unbegun" in per[0]:
                    unbegun, lost = (mean([one.get(key) for one in per]) for key in ("unbegun", "lost"))
                    cell += f"; unbegun {unbegun}, lost {lost}"
                cells.append(cell)
            missing = sum(not one["issued"] for one in outcomes)
            lines.append(f"| {way} | {missing} of {len(deals)} | " + " | ".join(cells) + " |")
        lines.append("")
    gates = [deal["two gates"][next(iter(deal["two gates"]))] for deal in deals]
    lines.append(
        "known %: " + ", ".join(f"{name} {mean([one[name]['known'] for one in gates])}" for name in names)
    )
    for title, error in (("ECE", "ece"), ("RMS calibration error, without chance,", "rms")):
        said = ", ".join(f"{name} {mean([one[name][error] for one in gates])}" for name in names)
        lines.append(f"{title} of the probability %: {said}")
    lines.append("scores chosen: " + ", ".join(str(one["chosen"]) for one in gates))
    return lines


def main(
    folder: Annotated[Path, typer.Argument(help="Of the task's answers.")],
    accuracy: Annotated[list[float] | None, typer.Option(help="To certify; repeat it for several.")] = None,
    sets: Annotated[str, typer.Option(help="Sets to look at, by commas.")] = "test",
    deals: Annotated[int, typer.Option(min=1)] = 5,
    eps: Annotated[float, typer.Option(help="Of the gate.")] = 0.02,
    components: Annotated[int, typer.Option(help="Of the gate.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file of every deal's figures.")] = None,
) -> None:
    torch.set_num_threads(1)
    settings, names = RuleSettings(eps=eps, components=components), sets.split(",")
    found = [deal_of(folder, seed, names, tuple(accuracy or (0.95,)), settings) for seed in range(deals)]
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo("\n".join(table(found, names)))


if __name__ == "__main__":
    typer.run(main)
