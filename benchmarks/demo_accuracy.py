"""Checks the promises of the demo's bundle on prompts that it has not seen.

    python -m benchmarks.demo_accuracy [--json]

`demo.task` makes four sets from `demo/sentences.txt`: *test* of the same kind as the calibration's, *shifted*
with longer sentences, *ood* of other tasks and noise, *near* with a changed instruction. The table shows, for each
alpha, the share answered and the accuracy among the answered. Answers are kept in var/demo; a second run only scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from candor.app.commands.evaluate import evaluate
from candor.app.commands.serve import EngineKind
from demo.task import made

ROOT = Path(__file__).resolve().parent.parent


def main(
    context: typer.Context,
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")] = ROOT / "demo/bundle",
    model: Annotated[Path, typer.Option(help="Directory of the model.")] = ROOT
    / "var/models/smollm2-135m-word-ordering",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    data = made("test").parent
    evaluate(
        context,
        bundle=bundle,
        model=model,
        data=data / "test.jsonl",
        shifted=data / "shifted.jsonl",
        ood=data / "ood.jsonl",
        near=made("near"),
        engine=EngineKind.vllm,
        hidden_cache=data / "answers",
        as_json=as_json,
    )


if __name__ == "__main__":
    typer.run(main)
