"""Records of the demo's kind from other sentences: to learn from (`train`) and, of others, to measure on (`held`).

python -m studies.knows.task --sentences var/knows/sentences.txt --out var/knows
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from demo.task import LONGEST, questions

SEED = 20261127


def main(
    sentences: Annotated[Path, typer.Option(help="Of `studies.knows.sentences`.")],
    out: Annotated[Path, typer.Option(help="Folder of the two files.")],
    held: Annotated[int, typer.Option(min=1, help="Prompts to measure on.")] = 400,
    train: Annotated[int, typer.Option(min=1, help="Most prompts to learn from.")] = 2000,
) -> None:
    lines = sentences.read_text(encoding="utf-8").splitlines()
    usual = [line for line in lines if len(line.split()) <= LONGEST]
    random.Random(SEED).shuffle(usual)
    for kind, some in {"held": usual[:held], "train": usual[held:] * 2}.items():  # two prompts of a sentence
        rows = list(questions(f"knows-{kind}", some, random.Random(f"{SEED}:{kind}")))
        rows = list({row["messages"][0]["content"]: row for row in rows}.values())[:train]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{kind}.jsonl").write_text(text, encoding="utf-8")
        typer.echo(f"{len(rows)} prompts -> {out / kind}.jsonl")


if __name__ == "__main__":
    typer.run(main)
