"""What a share of wrong labels does to a calibration, and what the suspects that it names are worth.

    python -m studies.label_noise var/gates/reviews --alpha 0.8 --alpha 0.85 --alpha 0.9

It works on kept answers (`python -m studies.two_gates.kept` makes the files calibration.pt and test.pt). A tenth of
the labels that are fitted on are turned by a fixed seed; with --everywhere also of those that certify. Suspects are
named among what is fitted on (`calibration.advice`); whoever looks at each of them mends the turned ones: here their
label is put back. The held-out labels are never turned.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from candor.calibration.fit import FitSettings, set_aside_for_certification, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share
from candor.calibration.rule_certificate import RuleParts
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import RULE_SHARE, Certifying, Outcome, calibrate_answers
from candor.engine.base import EVIDENCE, Representation

REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
SEED = 20261126


def read(path: Path) -> list[Labelled]:
    """Answers that the study of two gates kept."""
    return [
        Labelled(
            id=str(number),
            prompt_digest=row["digest"],
            messages=({"role": "user", "content": ""},),
            response=row["text"],
            label=row["label"],
            h=row["h"],
            fault=None if row["complete"] else "truncated",
            prompt_states=row["prompt"],
        )
        for number, row in torch.load(path, weights_only=True).items()
    ]


def turned(answers: Sequence[Labelled], ids: set[str]) -> list[Labelled]:
    return [replace(one, label=0 if one.label else 1) if one.id in ids else one for one in answers]


def drawn(answers: Sequence[Labelled], share: float) -> set[str]:
    """Ids of so many of them."""
    return set(random.Random(SEED).sample([one.id for one in answers], round(share * len(answers))))


def calibrated(
    fitting: Sequence[Labelled],
    apart: Sequence[Labelled],
    test: Sequence[Labelled],
    settings: FitSettings,
) -> Outcome:
    hidden = fitting[0].prompt_states.numel() // 2
    return calibrate_answers(
        fitting,
        standardisation_blocks(REPRESENTATION, hidden),
        settings,
        Certifying(None, 0.05, RULE_SHARE),
        RuleParts(RuleSettings(), REPRESENTATION.parts(hidden), (hidden, hidden)),
        held_out=test,
        certification=apart,
        progress=lambda _: None,
    )


def line(name: str, wrong: int, found: Outcome, alphas: Sequence[float]) -> str:
    evaluation = found.evaluation
    cells = [_cell(evaluation.rule[a].answered, evaluation.rule[a].accuracy_answered) for a in alphas]
    region = evaluation.lower[alphas[0]]
    cells.append(_cell(region.answered, region.accuracy_answered))
    return f"| {name} | {wrong} | " + " | ".join(cells) + " |"


def _cell(answered: Share, right: Share) -> str:
    if not answered.hits:
        return "none"
    return (
        f"{100 * answered.hits / answered.of:.1f} % [{100 * (answered.low or 0):.1f}, "
        f"{100 * (answered.high or 0):.1f}], {100 * (right.value or 0):.1f} % right"
    )


def main(
    kept: Annotated[Path, typer.Argument(help="Folder with calibration.pt and test.pt.")],
    alpha: Annotated[list[float], typer.Option(help="Target accuracies.")],
    share: Annotated[float, typer.Option(help="Of the labels, turned.")] = 0.1,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="Also of those that certify.")] = False,
    looks: Annotated[int, typer.Option(help="How often suspects are looked at.")] = 2,
    rounds: Annotated[int, typer.Option(help="Of the layer.")] = 10,
) -> None:
    alphas = tuple(sorted(set(alpha)))
    settings = FitSettings(alphas, rounds, 100, 256, 1e-4, 0)
    fitting, apart = set_aside_for_certification(read(kept / "calibration.pt"), RULE_SHARE, 0)
    test = read(kept / "test.pt")
    wrong = drawn(fitting, share)
    held_to = turned(apart, drawn(apart, share)) if everywhere else apart
    lines = [line("clean", 0, calibrated(fitting, apart, test, settings), alphas)]
    typer.echo(lines[0], err=True)
    for look in range(looks + 1):
        found = calibrated(turned(fitting, wrong), held_to, test, settings)
        name = f"a share of {share:g} turned" if look == 0 else f"mended {look}"
        lines.append(line(name, len(wrong), found, alphas))
        suspects = {one.id for one in found.advice.suspects}
        right = len(suspects & wrong)
        typer.echo(
            f"{name}: {len(wrong)} of {len(fitting)} labels wrong; {len(suspects)} suspects, {right} of them: "
            f"precision {right / max(1, len(suspects)):.2f}, recall {right / max(1, len(wrong)):.2f}"
        )
        typer.echo(lines[-1], err=True)
        wrong -= suspects
    titles = " | ".join([*(f"two gates at {a:g}" for a in alphas), f"region at {alphas[0]:g}"])
    typer.echo(f"\n| labels | wrong | {titles} |\n|---|---|" + "---|" * (len(alphas) + 1))
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
