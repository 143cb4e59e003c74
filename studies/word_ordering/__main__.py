"""The whole experiment with one command, on any files of sentences; a stopped run goes on where it was.

    python -m studies.word_ordering --sentences FILE... --out var/word-ordering

data, fine-tuning of every row, answers of every row's model, final layers, table and plots. Hours on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from candor.finetune import word_ordering as task
from studies.word_ordering import rows as experiment
from studies.word_ordering import table
from studies.word_ordering.answers import answer, sets_of
from studies.word_ordering.final_layers import ALPHAS, final_layers
from studies.word_ordering.signals import signals

MODELS = Path("var/models")
SIZES = task.Sizes(
    words=(2, 6),
    length=(6, 14),
    shifted_length=(19, 40),
    train=1200,
    development=256,
    calibration=2000,
    test=800,
    shifted=300,
)


def main(
    sentences: Annotated[list[str], typer.Option(help="As for `candor data word-ordering`; repeatable.")],
    harvard: Annotated[str | None, typer.Option(help="Sentences of a second test set.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("var/word-ordering"),
    pretrained: Annotated[Path, typer.Option(help="Directory of the untuned model.")] = MODELS
    / "smollm2-135m-instruct",
    start: Annotated[Path, typer.Option(help="Directory of the model that every row begins from.")] = MODELS
    / "smollm2-135m-word-ordering",
    row: Annotated[list[str] | None, typer.Option(help="Only these rows; repeatable.")] = None,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    figures: Annotated[Path | None, typer.Option(help="Folder of the plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")] = False,
) -> None:
    data = out / "data"
    if not (data / "train.jsonl").exists():
        lines = [line for source in sentences for line in task.read_sentences(source)]
        tests = {"harvard": task.read_sentences(harvard)} if harvard else {}
        task.write(task.build(lines, tests, SIZES, seed=0), data)
    bases = {"pretrained": pretrained, "start": start}
    results: dict[str, Any] = {}
    for described in experiment.ROWS:
        if row and described.name not in row:
            continue
        experiment.fine_tune(described, out, bases)
        kept = out / "results" / f"{described.name}.json"
        if not kept.exists():
            model = experiment.model_of(described, out, bases)
            sets = sets_of(data, described.of_each)
            answers = answer(model, data, sets, out / "answers", engine)
            found = final_layers(answers, sets) | {"signals": signals(model, answers.own["test"])}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found), encoding="utf-8")
        results[described.name] = json.loads(kept.read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(results))
    else:
        typer.echo(table.signals(results) + "\n")
        for write in (table.summary, table.markdown):
            typer.echo("\n\n".join(write(results, ALPHAS, kind) for kind in ("plain", "lower")) + "\n")
    if figures:
        table.plots(results, out, figures)


if __name__ == "__main__":
    typer.run(main)
