"""The rows' figures as the papers' tables (arXiv 2510.26183, Tables 2 to 4), and as two plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch

from candor.calibration.intervals import Share, bootstrap
from studies.word_ordering.rows import TITLES

REFERENCE = "ce"

LAYERS = {
    "documents": "papers' h, papers' documents",
    "answers": "papers' h, own answers",
    "evidence": "h and evidence, own answers",
    "last": "last state and evidence, own answers",
}
SETS = {"test": "in distribution", "harvard": "Harvard", "shifted": "shifted (longer)"}
CONDITIONS = {
    "right": "all admitted",
    "class 0": "truly wrong",
    "class 1": "truly right",
    "verdict 0": "judged wrong",
    "verdict 1": "judged right",
}

Results = dict[str, dict[str, Any]]


def summary(results: Results, alphas: Sequence[float], kind: str = "plain") -> str:
    """What every row admits, in short: one table for every alpha and layer. kind: "plain" or "lower"."""
    parts = []
    for alpha in alphas:
        for layer, title in LAYERS.items():
            parts += [f"### alpha = {alpha}, {title} ({kind} region), in short", ""]
            parts += [_in_short(results, layer, f"{kind} {alpha}"), ""]
    return "\n".join(parts).rstrip()


def signals(results: Results) -> str:
    """What single numbers say before a layer is fitted (studies.word_ordering.signals)."""
    named = {name: result["signals"] for name, result in results.items()}
    columns = list(dict.fromkeys(signal for found in named.values() for signal in found))
    rows = [
        [TITLES[name], *("-" if isnan(found[signal]) else f"{found[signal]:.3f}" for signal in columns)]
        for name, found in named.items()
    ]
    return "\n".join(["### ROC AUC of single numbers, in distribution", "", _table(["row", *columns], rows)])


def _in_short(results: Results, layer: str, reading: str) -> str:
    sets = _sets(results)
    rows = []
    for name, result in results.items():
        figures = result["layers"][layer]
        if "failed" in figures:
            rows.append([TITLES[name], "no layer", *[""] * (2 * len(sets) + 1)])
            continue
        shares = [share(figures[s][reading][key]) for s in sets for key in ("admitted", "right")]
        test = figures["test"][reading]
        three = ", ".join(f"{100 * count / test['admitted'][1]:.1f}" for count in test["deals"])
        rows.append(
            [TITLES[name], shares[0], three, *shares[1:2], _times(results, name, layer, reading), *shares[2:]]
        )
    head = [f"{SETS[s]}: {what}" for s in sets for what in ("admitted", "right")]
    times = f"times {TITLES[REFERENCE]}'s share"
    return _table(["row", head[0], "by deal, %", head[1], times, *head[2:]], rows)


def _times(results: Results, name: str, layer: str, reading: str) -> str:
    """Admitted share over the reference row's on the same test prompts, with its paired bootstrap interval."""
    if REFERENCE not in results:
        return "-"
    reference = results[REFERENCE]["layers"][layer]
    if "failed" in reference or not reference["test"][reading]["rows"]:
        return "-"
    n = reference["test"][reading]["admitted"][1]
    ours, theirs = torch.zeros(n), torch.zeros(n)
    ours[results[name]["layers"][layer]["test"][reading]["rows"]] = 1
    theirs[reference["test"][reading]["rows"]] = 1
    low, high = bootstrap(lambda rows: float(ours[rows].sum() / theirs[rows].sum()), n, seed=0)
    return f"{float(ours.sum() / theirs.sum()):.2f} [{low:.2f}, {high:.2f}]"


def markdown(results: Results, alphas: Sequence[float], kind: str = "plain") -> str:
    """Accuracy, then for every alpha and layer the admitted share and accuracy, by the papers' conditions.

    kind: "plain" or "lower".
    """
    parts = ["### Accuracy of all answers", "", _accuracy(results)]
    for alpha in alphas:
        for layer, title in LAYERS.items():
            parts += ["", f"### alpha = {alpha}, {title} ({kind} region)", ""]
            parts.append(_admitted(results, layer, f"{kind} {alpha}"))
    return "\n".join(parts)


def _accuracy(results: Results) -> str:
    measures = {"exact": "exact", "sentence": "sentence", "three": "exact, three words"}
    rows = [
        [TITLES[name], SETS[s], *(share(result["accuracy"][s][measure]) for measure in measures)]
        for s in _sets(results)
        for name, result in results.items()
    ]
    return _table(["row", "set", *measures.values()], rows)


def _admitted(results: Results, layer: str, reading: str) -> str:
    rows = []
    for s in _sets(results):
        for name, result in results.items():
            figures = result["layers"][layer]
            if "failed" in figures:
                rows.append([TITLES[name], SETS[s], "no layer", *[""] * len(CONDITIONS), ""])
                continue
            counts = figures[s][reading]
            right = [share(counts[key], interval=key == "right") for key in CONDITIONS]
            rows.append(
                [TITLES[name], SETS[s], share(counts["admitted"]), *right, f"{figures[s]['auroc']:.3f}"]
            )
    head = ["row", "set", "admitted", *(f"right, {title}" for title in CONDITIONS.values()), "AUROC"]
    return _table(head, rows)


def share(counts: Sequence[int], interval: bool = True) -> str:
    """ "43.1 % [39.6, 46.6]", exact 95 % interval; without it "95.1 % of 212"."""
    found = Share.from_counts(*counts)
    if found.value is None or found.low is None or found.high is None:
        return "-"
    percent = f"{100 * found.value:.1f} %"
    if not interval:
        return f"{percent} of {found.of}"
    return f"{percent} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _sets(results: Results) -> list[str]:
    return [s for s in SETS if all(s in result["accuracy"] for result in results.values())]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plots(results: Results, out: Path, folder: Path) -> None:
    """risk-coverage.png: of the layer with evidence, in distribution; admitted-by-epoch.png: of the layers that
    the runs train on the way, on development documents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)), (0, (2, 4))]
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for style, (name, result) in zip(styles, results.items(), strict=False):
        figures = result["layers"]["last"]
        if "failed" in figures:
            continue
        pairs = sorted(zip(figures["test"]["scores"], figures["test"]["right"], strict=True), reverse=True)
        wrong, coverage, risk = 0, [], []
        for count, (_, right) in enumerate(pairs, start=1):
            wrong += not right
            coverage.append(count / len(pairs))
            risk.append(wrong / count)
        axes.plot(coverage, risk, linestyle=style, label=TITLES[name])
    axes.set(xlabel="share answered", ylabel="share wrong among them", xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(folder / "risk-coverage.png", dpi=150)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for style, name in zip(styles, results, strict=False):
        log = out / "rows" / name / "metrics.csv"
        if not log.exists():
            continue
        with log.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["admitted"]]
        epochs = [float(row["epoch"]) for row in rows]
        axes.plot(
            epochs,
            [float(row["admitted"]) for row in rows],
            linestyle=style,
            marker="o",
            label=TITLES[name],
        )
    axes.set(xlabel="epoch", ylabel="share of development documents admitted, alpha 0.9", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(folder / "admitted-by-epoch.png", dpi=150)
