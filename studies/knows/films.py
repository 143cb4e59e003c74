"""Reviews of films, to learn from, to measure on, to calibrate on and to test on: `demo.reviews` judges products.

    python -m studies.knows.films --ratings movieReviewSnippets_GroundTruth.txt --out var/knows/films

FILE comes with the source distribution of `vaderSentiment`: number, mean human rating from -4 to 4, text. Reviews
with a plain rating are taken, and asked as `demo.reviews` asks.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

ASK = "Is the sentiment of this product review positive or negative? Answer with one word.\n\n{text}"
PLAIN = 1.0
WORDS = range(3, 31)
SEED = 20261127
SIZES = {"held": 400, "calibration": 2000, "test": 1000, "train": 4000}
"""Prompts of each file."""


def main(
    ratings: Annotated[Path, typer.Option(help="Rated reviews.")],
    out: Annotated[Path, typer.Option(help="Folder of the files.")],
) -> None:
    rows: list[dict[str, Any]] = []
    for line in ratings.read_text(encoding="utf-8", errors="replace").splitlines():
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= PLAIN and len(text.split()) in WORDS:
            word = "positive" if float(rating) > 0 else "negative"
            rows.append(
                {
                    "id": f"film-{number}",
                    "messages": [{"role": "user", "content": ASK.format(text=text)}],
                    "reference": rf"(?i)^\W*{word}\b",
                    "verifier": "regex",
                }
            )
    rows = list({row["messages"][0]["content"]: row for row in rows}.values())
    random.Random(SEED).shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    start = 0
    for kind, size in SIZES.items():
        some, start = rows[start : start + size], start + size
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (out / f"{kind}.jsonl").write_text(text, encoding="utf-8")
        typer.echo(f"{len(some)} of {len(rows)} reviews -> {out / kind}.jsonl")


if __name__ == "__main__":
    typer.run(main)
