"""What should enter the adaptor: the papers' h, the generation's evidence, or both; on the answers of two tasks.

    python -m studies.ablation [--seeds 5] [--rounds 3]

Every choice is a selection of h's blocks out of the same cached answers (`studies.two_tasks` makes them), fitted
with the bundles' settings on other halves for every seed, and reported on the same three sets, which nothing is
fitted on. Choosing by these figures is a choice made in sight of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer

from candor.calibration.evaluate import Evaluation, evaluate
from candor.calibration.fit import FitSettings, fit, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.engine.base import Part, Representation
from candor.model_store.bundle import load_bundle
from studies.two_tasks.table import over_seeds
from studies.two_tasks.tasks import ARITHMETIC, DEMO, SETS, Task, answers

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


def cells(found: Sequence[dict[str, Evaluation]]) -> Iterator[str]:
    """found: by set, one for each seed. Means over the seeds, with the smallest and the largest."""

    yield f"{sum(one['test'].lower[ALPHA].admitted.hits > 0 for one in found)} of {len(found)}"
    yield over_seeds([one["test"].auroc[0] for one in found if one["test"].auroc], percent=False)
    for name in SETS:
        readings = [one[name].lower[ALPHA] for one in found]
        yield over_seeds([reading.answered.value or 0.0 for reading in readings], percent=True)
        if name != "ood":
            yield over_seeds([reading.accuracy_answered.value for reading in readings], percent=True)


def measured(task: Task, seeds: int, rounds: int, epochs: int) -> Iterator[str]:
    manifest = load_bundle(task.bundle).manifest
    whole, width = manifest.representation, manifest.model.hidden_size
    fitting, sets = answers(task, "calibration"), {name: answers(task, name) for name in SETS}
    yield f"\n## {task.name.capitalize()}\n"
    yield (
        f"{len(fitting)} records to fit on; alpha {ALPHA}; {seeds} deals of halves, {rounds} rounds of {epochs} "
        "epochs, M = 256, learning rate 1e-4; lower estimator, mean (smallest to largest) in per cent\n"
    )
    columns = (
        "what enters",
        "regions",
        "AUROC",
        "answered",
        "right",
        "shifted: answered",
        "right",
        "ood: answered",
    )
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for title, parts in CHOICES.items():
        chosen = replace(whole, order=parts, evidence=whole.evidence if "evidence" in parts else ())
        blocks = standardisation_blocks(chosen, width)
        selected = select(fitting, whole, parts, width)
        found = []
        for seed in range(seeds):
            settings = FitSettings((ALPHA,), rounds, epochs, 256, 1e-4, seed)
            estimator = fit(selected, blocks, settings, lambda done: None).estimator
            found.append(
                {
                    name: evaluate(estimator, select(one, whole, parts, width), (ALPHA,), seed)
                    for name, one in sets.items()
                }
            )
        yield f"| {title} | " + " | ".join(cells(found)) + " |"


def main(
    seeds: Annotated[int, typer.Option(help="Fits of each choice, on other halves.")] = 5,
    rounds: Annotated[int, typer.Option(help="Layers of a fit, of which the best is kept.")] = 3,
    epochs: int = 100,
) -> None:
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    for task in (DEMO, ARITHMETIC):
        for line in measured(task, seeds, rounds, epochs):
            print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
