"""Answers that `candor calibrate` or `candor evaluate` kept, as this study's files.

python -m studies.two_gates.kept --model M --bundle B --answers DIR --data test.jsonl --out var/gates/NAME/test.pt
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import torch
import typer

from candor.calibration.answering import AnsweringOptions, DataFile, answer_file
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import load_bundle
from studies.two_tasks.tasks import finished


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model.")],
    bundle: Annotated[Path, typer.Option(help="Bundle whose policy the answers were made by.")],
    answers: Annotated[Path, typer.Option(help="Folder of the kept answers, --hidden-cache.")],
    data: Annotated[Path, typer.Option(help="Records that were answered.")],
    out: Annotated[Path, typer.Option(help="File to write, .pt.")],
) -> None:
    """Raises NotKept where an answer was not kept."""
    manifest = load_bundle(bundle).manifest
    file, chat = DataFile.load(data), ChatFormat.from_directory(model)
    engine, asking = finished(model, manifest, chat), AnsweringOptions(answers, 1)
    found = asyncio.run(answer_file(engine, chat, file, manifest.policy, asking, data.stem))
    width = max(len(one.h) for one in found)
    rows = {
        number: {
            "text": one.response,
            "label": one.label,
            "complete": one.fault is None,
            "h": one.h if len(one.h) else torch.full((width,), torch.nan),
            "prompt": one.prompt_states,
            "digest": one.prompt_digest,
        }
        for number, one in enumerate(found)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rows, out)
    typer.echo(f"{len(rows)} answers -> {out}")


if __name__ == "__main__":
    typer.run(main)
