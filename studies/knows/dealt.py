"""Answers that a calibration kept, dealt: to teach an adapter, and to calibrate on.

    python -m studies.knows.dealt --answers var/gates/demo --records var/demo --number 1000 --out var/knows/greedy

`--answers` has calibration.pt and test.pt, and ood.pt where strangers are asked, as studies.two_gates.answers or
studies.two_gates.kept write them; `--records` the .jsonl files of these names. OUT gets train and held, and the rows
that are not taught: `frozen`, calibrated on what is held, and `all`, calibrated on everything.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from candor.calibration.data import load


def answered(answers: Path, records: Path) -> dict[int, dict[str, Any]]:
    """Rows with the digests that prompts have now."""
    rows, asked = torch.load(answers), load(records).records
    if len(rows) != len(asked):
        raise typer.BadParameter(
            f"{answers} has {len(rows)} answers, {records} {len(asked)} records: not the same"
        )
    return {i: rows[i] | {"digest": record.prompt_digest} for i, record in enumerate(asked)}


def main(
    answers: Annotated[Path, typer.Option(help="Folder of the answers.")],
    records: Annotated[Path, typer.Option(help="Folder of the records.")],
    number: Annotated[int, typer.Option(min=1, help="Answers to teach with.")],
    out: Annotated[Path, typer.Option(help="Folder of what is dealt.")],
    seed: int = 0,
) -> None:
    rows = answered(answers / "calibration.pt", records / "calibration.jsonl")
    lines = (records / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for row in ("frozen", "all"):
        (out / "rows" / row).mkdir(parents=True, exist_ok=True)
    for name, part in {"train": order[:number], "held": order[number:]}.items():
        (out / f"{name}.jsonl").write_text("".join(lines[i] for i in part), encoding="utf-8")
        torch.save({k: rows[i] for k, i in enumerate(part)}, out / f"{name}.pt")
    torch.save({k: rows[i] for k, i in enumerate(order[number:])}, out / "rows/frozen/calibration.pt")
    torch.save(rows, out / "rows/all/calibration.pt")
    for name in ("test", "ood"):
        if (answers / f"{name}.pt").exists():
            seen = answered(answers / f"{name}.pt", records / f"{name}.jsonl")
            for row in ("frozen", "all"):
                torch.save(seen, out / "rows" / row / f"{name}.pt")


if __name__ == "__main__":
    typer.run(main)
