r"""One table of labelled questions in ten kinds of file, each through `candor data check` and `candor calibrate`.

    python -m benchmarks.kinds --model MODEL --data TABLE.csv --columns COLUMNS --wrong COLUMN --verifier VERIFIER \
      --answers FOLDER

COLUMN holds a wrong answer to each question. Eight kinds ask the model, whose answers are kept in FOLDER, and must
give the same bundle. The exports of Argilla and Label Studio bring responses that people
have labelled: here the reference or the wrong answer, by turns. Argilla's is written by its own library where that is
installed, Label Studio's in the form that its server downloads.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

from candor.calibration.data import load
from candor.calibration.shapes import Reading

Row = dict[str, str]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path: Path, rows: list[Row], encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[Row]) -> None:
    import_module("pyarrow.parquet").write_table(import_module("pyarrow").Table.from_pylist(rows), path)


def data_set(path: Path, rows: list[Row]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path))


def fine_tuning(row: Row) -> dict[str, Any]:
    turns = (("user", row["question"]), ("assistant", row["reference"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def evals(row: Row) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": row["question"]}], "ideal": row["reference"]}


ASKED: dict[str, tuple[str, Callable[[Path, list[Row]], object]]] = {
    "CSV": ("d.csv", table),
    "CSV in UTF-16": ("d.csv", lambda path, rows: table(path, rows, "utf-16")),
    "JSON Lines": ("d.jsonl", lambda path, rows: path.write_text(lines(rows))),
    "JSON array": ("d.json", lambda path, rows: path.write_text(json.dumps(rows))),
    "Parquet": ("d.parquet", parquet),
    "Hugging Face data set": ("d", data_set),
    "OpenAI fine-tuning": (
        "d.jsonl",
        lambda path, rows: path.write_text(lines(list(map(fine_tuning, rows)))),
    ),
    "OpenAI Evals": ("d.jsonl", lambda path, rows: path.write_text(lines(list(map(evals, rows))))),
}


def answered(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(question, answer, verdict), right and wrong by turns."""
    return [
        (row["question"], row["opposite" if n % 2 else "reference"], "wrong" if n % 2 else "right")
        for n, row in enumerate(rows)
    ]


def argilla(path: Path, rows: list[Row]) -> None:
    rg: Any = import_module("argilla")
    io: Any = import_module("argilla.records._io")
    person = UUID(int=1)
    records = [
        rg.Record(
            id=str(n),
            fields={"question": question, "answer": answer},
            responses=[rg.Response("verdict", verdict, user_id=person, status="submitted")],
        )
        for n, (question, answer, verdict) in enumerate(answered(rows))
    ]
    path.write_text(json.dumps(io.GenericIO.to_list(records)))


def label_studio(path: Path, rows: list[Row]) -> None:
    def task(n: int, question: str, answer: str, verdict: str) -> dict[str, Any]:
        result = {
            "type": "choices",
            "value": {"choices": [verdict]},
            "from_name": "verdict",
            "to_name": "chat",
        }
        annotation = {"id": n, "completed_by": 1, "was_cancelled": False, "result": [result]}
        return {"id": n, "data": {"question": question, "answer": answer}, "annotations": [annotation]}

    path.write_text(json.dumps([task(n, *one) for n, one in enumerate(answered(rows), 1)]))


LABELLED: dict[str, tuple[str, Callable[[Path, list[Row]], object]]] = {
    "Argilla export": ("d.json", argilla),
    "Label Studio export": ("d.json", label_studio),
}


def candor(*words: object) -> str:
    """Standard output. Raises CalledProcessError where the command fails."""
    command = [sys.executable, "-m", "candor.app.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "answers"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("columns", "wrong", "verifier"):
        parser.add_argument(f"--{name}", required=True)
    given, rest = parser.parse_known_args()  # the rest is for `candor calibrate`
    read = load(given.data, Reading.parse(given.columns, given.verifier)).records
    rows = [
        {
            "question": one.prompt,
            "reference": str(one.reference["answer"]),
            "opposite": dict(one.row)[given.wrong],
        }
        for one in read
        if one.reference is not None
    ]
    print("| kind | data check | seconds | bundle | let through |\n|---|---|---|---|---|")
    for title, (name, write) in {**ASKED, **LABELLED}.items():
        with TemporaryDirectory() as folder:
            path, out = Path(folder) / name, Path(folder) / "bundle"
            try:
                write(path, rows)
            except ImportError as error:
                print(f"| {title} | not written: {error} | | | |")
                continue
            how = ["--verifier", given.verifier] if title in ASKED else []
            said = candor("data", "check", path, *how).splitlines()[0].replace(f"{folder}/", "")
            began = time.perf_counter()
            made = json.loads(
                candor("calibrate", "--model", given.model, "--data", path, *how, "--hidden-cache", given.answers,
                       "--out", out, "--json", *rest)
            )  # fmt: skip
            seconds = time.perf_counter() - began
            weights = sha256(
                b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))
            ).hexdigest()
            print(f"| {title} | {said} | {seconds:.0f} | {weights[:8]} | {shares(made)} |", flush=True)


def shares(made: dict[str, Any]) -> str:
    """At each promise, how many of the certifying answers are let through."""
    found = {one["alpha"]: one["certificate"] for one in made["report"]["rule"]["certification"]}
    return ", ".join(
        f"{alpha}: " + (f"{held['answered']} of {held['records']}" if held else "no certificate")
        for alpha, held in found.items()
    )


if __name__ == "__main__":
    main()
