"""What a frozen state at the tag knows, by how many answers taught it: ROC AUC on held-out prompts, over five deals.

    python -m studies.knows.curve --folder var/knows/TASK

FOLDER has train.pt and held.pt (`studies.knows.answers`). Every deal learns from the answers to other random prompts.
A logistic regression of both log-odds combines state and evidence on one half of the held-out prompts; the other half
measures it. Every deal has other halves, the same ones for every size. What an adapter adds, `candor finetune --loss
probe` says.

    curve      1 - AUC(n) = floor + scale n^-power,    fitted by least squares; its uncertainty by redrawing deals
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy
import torch
import typer
from torch import Tensor

from candor.calibration.evaluate import auroc
from candor.calibration.logistic import fit_chosen, fit_logistic
from candor.calibration.rule import REACHES
from candor.calibration.splits import split
from candor.engine.base import EVIDENCE
from candor.sdm.adaptor import Block
from studies.two_gates.answers import Answered, load

SIZES = (500, 1000, 2000, 4000, 8000)
DEALS = 5
REDRAWS = 1000
ACCURACIES = 0.9, 0.95, 0.98


class Answers:
    """Of answers that ended on their own: state (n, H), evidence (n, 6), label (n,), digests of their prompts."""

    def __init__(self, answered: Answered) -> None:
        some = answered.take(answered.complete.nonzero().squeeze(1).tolist())
        hidden = (some.h.shape[1] - len(EVIDENCE)) // 2
        self.state, self.evidence = some.h[:, hidden : 2 * hidden], some.h[:, 2 * hidden :]
        self.label, self.digests, self._all = some.labels, some.digests, some

    def first(self, number: int, seed: int) -> Answers:
        """Those to prompts in a random order, up to so many in all."""
        rows: dict[str, list[int]] = {}
        for row, digest in enumerate(self.digests):
            rows.setdefault(digest, []).append(row)
        order, taken = list(rows.values()), list[int]()
        random.Random(seed).shuffle(order)
        while order and len(taken) < number:
            taken += order.pop()
        return Answers(self._all.take(taken))


def regression(x: Tensor, answers: Answers, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """w and b with the penalty that cross-validation over prompts prefers."""
    folds = split(answers.digests, answers.label.tolist(), (0.2,) * 5, 0)
    chosen = fit_chosen(x.double(), answers.label, blocks, folds, REACHES)
    return chosen.w, chosen.b


def halves(held: Answers, deal: int) -> Tensor:
    """(n,): whether the answer is in the half that combines; the other is measured on."""
    digests = sorted(set(held.digests))
    chosen = set(random.Random(deal).sample(digests, len(digests) // 2))
    return torch.tensor([digest in chosen for digest in held.digests])


def combined(state: Tensor, evidence: Tensor, held: Answers, fits: Tensor) -> Tensor:
    x = torch.stack([state.double(), evidence.double()], 1)
    x = (x - x[fits].mean(0)) / x[fits].std(0)
    ((w, b),) = fit_logistic(x[fits], held.label[fits], (30.0,))
    return x @ w + b


def measured(state: Tensor, evidence: Tensor, held: Answers, deal: int) -> dict[str, float]:
    fits = halves(held, deal)
    both = combined(state, evidence, held, fits)
    rows = {"state": state, "evidence": evidence, "both": both}
    return {name: auroc(values[~fits], held.label[~fits]) for name, values in rows.items()}


def power_law(sizes: Sequence[int], errors: numpy.ndarray) -> tuple[float, float, float]:
    """floor, scale, power of errors ~ floor + scale n^-power by least squares over a grid of powers; floor >= 0."""
    best = (numpy.inf, (0.0, 0.0, 0.0))
    for power in numpy.linspace(0.05, 1.5, 146):
        x = numpy.asarray(sizes, float) ** -power
        for columns in (numpy.stack([numpy.ones_like(x), x], 1), numpy.stack([0 * x, x], 1)):
            (floor, scale), *_ = numpy.linalg.lstsq(columns, errors, rcond=None)
            off = float(((columns @ (floor, scale) - errors) ** 2).sum())
            if floor >= 0 and scale >= 0 and off < best[0]:
                best = (off, (float(floor), float(scale), float(power)))
    return best[1]


def extrapolated(sizes: Sequence[int], aucs: Tensor, at: Sequence[int]) -> list[str]:
    """aucs (sizes, deals). What the curve says of other sizes, with 95 % of what redrawn deals say."""
    rng = numpy.random.default_rng(0)
    errors = 1 - aucs.numpy()

    def said(by: numpy.ndarray) -> list[float]:
        floor, scale, power = power_law(sizes, by)
        return [1 - floor, power, *(1 - floor - scale * n**-power for n in at)]

    redrawn = [
        said(errors[:, rng.integers(errors.shape[1], size=errors.shape[1])].mean(1)) for _ in range(REDRAWS)
    ]
    low, high = numpy.quantile(redrawn, (0.025, 0.975), axis=0)
    names = ["without end", "power", *(f"{n:,}" for n in at)]
    return [
        f"{name} {value:.3f} [{a:.3f}, {b:.3f}]"
        for name, value, a, b in zip(names, said(errors.mean(1)), low, high, strict=True)
    ]


def answerable(right: float, auc: float, accuracy: float) -> float:
    """Share that a threshold lets through at this accuracy, where a share `right` of all is right and the scores of
    right and wrong answers are normal with one variance and this ROC AUC; it has the ceiling right / accuracy."""
    normal = NormalDist()
    apart = 2**0.5 * normal.inv_cdf(auc)
    most = 0.0
    for cut in numpy.linspace(-4, 7, 1101):
        good, bad = right * normal.cdf(apart - cut), (1 - right) * normal.cdf(-cut)
        if good >= accuracy * (good + bad):
            most = max(most, good + bad)
    return most


def wanted(right: float, auc: float, accuracy: float, times: float = 1.3) -> str:
    """What lets so many times as many through as `auc` does."""
    now = answerable(right, auc, accuracy)
    for better in numpy.linspace(auc, 0.999, 200):
        if answerable(right, float(better), accuracy) >= times * now:
            return f"AUC {better:.3f}"
    return "no AUC"


def main(
    folder: Annotated[Path, typer.Option(help="Of the task's answers, train.pt and held.pt.")],
    sizes: Annotated[str, typer.Option(help="Answers to learn from, by commas.")] = ",".join(map(str, SIZES)),
) -> None:
    torch.set_num_threads(1)
    everything, held = (Answers(load(folder / f"{name}.pt")) for name in ("train", "held"))
    hidden = held.state.shape[1]
    state_blocks: list[Block] = [(hidden, "scalar")]
    evidence_blocks: list[Block] = [(len(EVIDENCE), "feature")]
    for name, some in {"train": everything, "held": held}.items():
        prompts, right = len(set(some.digests)), some.label.double().mean()
        typer.echo(f"{name}: {len(some.label)} answers to {prompts} prompts, {right:.1%} right")
    w, b = regression(everything.evidence, everything, evidence_blocks)
    evidence = held.evidence.double() @ w + b
    typer.echo("| taught by | answers | state | evidence | both |\n|---|---|---|---|---|")

    def show(title: str, answers: object, found: Sequence[dict[str, float]]) -> None:
        columns = torch.tensor([[one[name] for name in ("state", "evidence", "both")] for one in found])
        mean, spread = columns.mean(0), columns.std(0)
        cells = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
        typer.echo(f"| {title} | {answers} | {cells} |")

    enough = len(everything.label)
    numbers = [n for n in map(int, sizes.split(",")) if n <= 1.05 * enough] or [enough]
    curve = []
    for number in numbers:
        found = []
        for deal in range(DEALS):
            answers = everything.first(number, deal)
            w, b = regression(answers.state, answers, state_blocks)
            found.append(measured(held.state.double() @ w + b, evidence, held, deal))
        show("frozen state", number, found)
        curve.append([[one["state"], one["both"]] for one in found])
    aucs = torch.tensor(curve)  # (sizes, deals, 2)
    for name, at in (("state", 0), ("both", 1)):
        if len(numbers) > 2:
            typer.echo(
                f"{name}, n^-power: " + "; ".join(extrapolated(numbers, aucs[:, :, at], (32_000, 128_000)))
            )
    base, best = float(held.label.double().mean()), float(aucs[-1, :, 1].mean())
    for accuracy in ACCURACIES:
        now, most = answerable(base, best, accuracy), min(1, base / accuracy)
        typer.echo(
            f"at {accuracy} a threshold on an AUC of {best:.3f} lets {now:.1%} through, at most {most:.1%}; 1.3 "
            f"times that: {wanted(base, best, accuracy)}"
        )


if __name__ == "__main__":
    typer.run(main)
