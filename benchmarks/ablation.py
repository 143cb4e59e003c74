"""What should enter the adaptor: the papers' h, the generation's evidence, or both; on the demo's answers.

    python -m benchmarks.ablation [--seeds 3] [--rounds 2]

Every choice is a selection of h's blocks out of the same cached answers (`benchmarks.demo_answers`), fitted
with the demo's settings on other halves for every seed, and reported on the same held-out prompts, which
nothing is fitted on. Choosing by these figures is a choice made in sight of the held-out set.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks import demo_answers
from calibration.evaluate import Evaluation, evaluate
from calibration.fit import FitSettings, fit, standardisation_blocks
from calibration.generate import Labelled
from engine.base import Part, Representation
from model_store.bundle import load_bundle

ALPHA = 0.9

CHOICES: dict[str, tuple[Part, ...]] = {
    "mean and last state (the papers' h)": ("mean", "last"),
    "evidence": ("evidence",),
    "last state and evidence": ("last", "evidence"),
    "mean state and evidence": ("mean", "evidence"),
    "mean, last state and evidence": ("mean", "last", "evidence"),
}


def select(
    answers: list[Labelled], whole: Representation, parts: tuple[Part, ...], width: int
) -> list[Labelled]:
    """The answers with only these blocks of h."""
    sizes = whole.block_sizes(width)

    def blocks(h: torch.Tensor) -> torch.Tensor:
        split = dict(zip(whole.order, torch.split(h, list(sizes)), strict=True))
        return torch.cat([split[part] for part in parts])

    return [replace(answer, h=blocks(answer.h)) if answer.h.numel() else answer for answer in answers]


def line(name: str, found: list[Evaluation]) -> str:
    """Medians over the seeds, with lowest and highest."""

    def spread(values: list[float], percent: bool) -> str:
        scale, digits = (100, 1) if percent else (1, 3)
        low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
        return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    cells = [spread([one.auroc[0] for one in found if one.auroc], percent=False)]
    for readings in ([one.lower[ALPHA] for one in found], [one.plain[ALPHA] for one in found]):
        right = [value for one in readings if (value := one.accuracy_answered.value) is not None]
        cells.append(spread([one.answered.value or 0.0 for one in readings], percent=True))
        cells.append(spread(right, percent=True) if right else "none answered")
    return f"| {name} | " + " | ".join(cells) + " |"


def main(
    seeds: Annotated[int, typer.Option(help="Fits of each choice, on other halves.")] = 3,
    rounds: Annotated[int, typer.Option(help="Layers of a fit, of which the best is kept.")] = 2,
    epochs: int = 100,
) -> None:
    torch.set_num_threads(1)
    manifest = load_bundle(demo_answers.ROOT / "demo/bundle").manifest
    whole, width = manifest.representation, manifest.model.hidden_size
    fitting, held_out = demo_answers.load("calibration"), demo_answers.load("test")
    print(
        f"{len(fitting)} records to fit on, {len(held_out)} held out; alpha {ALPHA}; {seeds} seeds, {rounds} rounds, "
        f"{epochs} epochs, M = 256, learning rate 1e-4; median [lowest, highest] in per cent\n"
    )
    print("| what enters | AUROC | answered, lower | right, lower | answered, plain | right, plain |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, parts in CHOICES.items():
        chosen = replace(whole, order=parts, evidence=whole.evidence if "evidence" in parts else ())
        found = []
        for seed in range(seeds):
            settings = FitSettings((ALPHA,), rounds, epochs, 256, 1e-4, seed)
            fitted = fit(
                select(fitting, whole, parts, width),
                standardisation_blocks(chosen, width),
                settings,
                lambda done: None,
            )
            found.append(evaluate(fitted.estimator, select(held_out, whole, parts, width), (ALPHA,), seed))
        print(line(name, found), flush=True)


if __name__ == "__main__":
    typer.run(main)
