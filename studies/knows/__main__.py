"""The whole study for one model and one task; a stopped run goes on where it was, as every step keeps what it has.

    python -m studies.knows --model M --data FOLDER --out OUT

FOLDER holds train, held, calibration and test, .jsonl: prompts to learn from, to measure what a state knows on, to
calibrate on, and to look at once, in the end. On one GPU a model of 1.5B to 4B parameters takes the same command;
with --records 100 it is tried in some minutes anywhere.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

CONFIG = Path(__file__).parents[2] / "finetune/configs/one.yaml"


def step(done: Path, *arguments: object, launcher: tuple[object, ...] = ()) -> None:
    """Runs a module of this study, unless what it makes is there."""
    if not done.exists():
        command = [sys.executable, *(launcher or ("-m",)), *arguments]
        typer.echo(f"-- {' '.join(map(str, arguments))}", err=True)
        subprocess.run([str(part) for part in command], check=True)


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model, fine-tuned on the task.")],
    data: Annotated[Path, typer.Option(help="Folder of the records.")],
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")],
    samples: Annotated[int, typer.Option(min=2, help="Answers a prompt.")] = 4,
    batch: Annotated[int, typer.Option(help="Answers of a training step.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 64,
    accuracy: Annotated[float, typer.Option(help="To certify.")] = 0.9,
    config: Annotated[Path, typer.Option(help="accelerate's.")] = CONFIG,
    records: Annotated[int | None, typer.Option(help="Of each file at most: a dry run.")] = None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "held", "calibration", "test"):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / f"{name}.jsonl").write_text("".join(lines[:records]), encoding="utf-8")

    def answered(by: Path, folder: Path, names: tuple[str, str], of_each: int) -> None:
        files = [
            part
            for name in names
            for part in ("--data", out / f"{name}.jsonl", "--out", folder / f"{name}.pt")
        ]
        told = ("--samples", of_each, "--max-tokens", max_tokens, "--cache", out / "answers")
        step(folder / f"{names[1]}.pt", "studies.knows.answers", "--model", by, *files, *told)

    run = out / "probe"
    step(
        run / "model/config.json",
        *("candor.app.cli", "finetune", "--loss", "probe", "--model", model, "--out", run),
        *("--data", out / "train.jsonl", "--held-out", out / "held.jsonl", "--samples", samples),
        *("--batch-size", batch, "--micro-batch", batch, "--max-tokens", max_tokens),
        *(("--resume",) if (run / "settings.json").exists() else ()),
        launcher=("-m", "accelerate.commands.launch", "--config_file", config, "-m"),
    )
    rows = {"before": model, "probe": run / "model"}
    for name, by in rows.items():
        answered(by, out / "rows" / name, ("calibration", "test"), 1)
    answered(model, out, ("train", "held"), samples)
    step(out / "none", "studies.knows.curve", "--folder", out)
    step(out / "none", "studies.knows.table", out / "rows", *rows, "--accuracy", accuracy)


if __name__ == "__main__":
    typer.run(main)
