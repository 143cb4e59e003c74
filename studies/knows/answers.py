"""A model's own answers to a file of records, labelled, with their states: vLLM, kept, so a stopped run goes on.

    python -m studies.knows.answers --model M --data records.jsonl --out var/knows/NAME.pt [--samples 4]

One sample is the greedy answer, as served. The file is one of `studies.two_gates.answers`: several answers to one
prompt stand next to each other and share its digest.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from candor.calibration.answering import AnsweringOptions, DataFile, answer_file
from candor.calibration.generate import Labelled
from candor.calibration.kept import asked
from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.policy.policy import Policy
from studies.two_gates.deals import REPRESENTATION

IN_FLIGHT = 32
KEPT_EVERY = 100
"""Records."""


def kept(found: list[Labelled], out: Path) -> None:
    """Writes them as `studies.two_gates.answers.load` reads them; states that were lost are NaN."""
    flat = [attempt for one in found for attempt in one.attempts]
    width = max(len(one.h) for one in flat)
    prompts = max(len(one.prompt_states) for one in flat)
    rows = {
        number: {
            "text": one.response,
            "label": one.label,
            "complete": one.fault is None,
            "h": one.h if len(one.h) else torch.full((width,), torch.nan),
            "prompt": one.prompt_states if len(one.prompt_states) else torch.full((prompts,), torch.nan),
            "digest": one.prompt_digest,
        }
        for number, one in enumerate(flat)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rows, out)
    right = sum(one.label for one in flat) / len(flat)
    typer.echo(f"{len(flat)} answers, {right:.1%} right -> {out}")


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model.")],
    data: Annotated[list[Path], typer.Option(help="Records, JSON Lines; one --out for each, in order.")],
    out: Annotated[list[Path], typer.Option(help="Files to write, .pt.")],
    samples: Annotated[int, typer.Option(min=1, help="Answers a prompt; 1: the greedy one.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of several answers.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 64,
    first: Annotated[int | None, typer.Option(help="Records of each file; default: all.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of kept answers; default: beside --out.")] = None,
) -> None:
    chat = ChatFormat.from_directory(model)
    policy = Policy(temperature if samples > 1 else 0.0, max_tokens=max_tokens, resample=samples)
    settings = EngineSettings(
        model, representation=REPRESENTATION, max_model_len=512, max_num_seqs=IN_FLIGHT, eager=True
    )

    async def ask(engine: Engine) -> None:
        asking = AnsweringOptions(cache or out[0].parent / "answers", IN_FLIGHT)
        for path, into in zip(data, out, strict=True):
            file, found = DataFile.load(path), []
            for start in range(0, len(file.records[:first]), KEPT_EVERY):
                part = replace(file, records=file.records[:first][start : start + KEPT_EVERY])
                found += await answer_file(engine, chat, part, policy, asking, path.stem)
                kept(found, into)

    asyncio.run(asked(settings, chat, None, ask))


if __name__ == "__main__":
    typer.run(main)
