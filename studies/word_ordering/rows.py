"""The rows of the experiment: which model, fine-tuned how. Everything else is the same for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from candor.finetune.word_ordering import SYSTEM_PROMPT


@dataclass(frozen=True)
class Row:
    """options: of `candor finetune`; None, the model as it is. base: "pretrained", or "start", which every
    fine-tuned row begins from. teacher: the row whose model teaches. of_each: it is asked only so many prompts of
    each set."""

    name: str
    options: Sequence[str] | None
    base: str = "start"
    teacher: str | None = None
    of_each: int | None = None


CE = ("--loss", "ce", "--hard-negatives")
SDM = ("--loss", "sdm", "--hard-negatives")

ROWS = (
    Row("pretrained", None, base="pretrained", of_each=100),  # right in none; it rambles, which takes long
    Row("start", None),
    Row("ce", (*CE, "off")),
    Row("sdm-hn", (*SDM, "on")),
    Row("sdm", (*SDM, "off")),
    Row("ce-hn", (*CE, "on")),
    Row("sdm-hn-1", (*SDM, "on", "--seed", "1")),
    Row("first", ("--loss", "first", "--hard-negatives", "off"), teacher="ce"),
    Row("ual", ("--loss", "ual", "--hard-negatives", "off", "--samples", "1")),
)

TITLES = {
    "pretrained": "untuned",
    "start": "start of every row below",
    "ce": "CE(CM)",
    "ce-hn": "CE(CM+HN)",
    "sdm": "SDM(CM)",
    "sdm-hn": "SDM(CM+HN), seed 0",
    "sdm-hn-1": "SDM(CM+HN), seed 1",
    "ual": "UAL",
    "first": "FIRST",
}

SAME_FOR_ALL = (
    *("--system-prompt", SYSTEM_PROMPT, "--epochs", "2", "--learning-rate", "5e-4"),
    *("--generate-from", "0", "--gamma-gen", "1", "--gamma-diversity", "1", "--max-tokens", "48"),
    *("--layer-epochs", "100", "--layer-dim", "256", "--layer-learning-rate", "1e-4"),
)


def model_of(row: Row, out: Path, bases: dict[str, Path]) -> Path:
    """Where the row's model is, or will be."""
    return bases[row.base] if row.options is None else out / "rows" / row.name / "model"


def fine_tune(row: Row, out: Path, bases: dict[str, Path]) -> None:
    """Trains the row's model, going on where an earlier run stopped; nothing where it is there."""
    run = out / "rows" / row.name
    if row.options is None or (run / "model").exists():
        return
    teacher = ("--teacher", str(out / "rows" / row.teacher / "model")) if row.teacher else ()
    subprocess.run(
        [
            *(sys.executable, "-c", "from candor.app.cli import main; main()", "finetune"),
            *("--model", str(bases[row.base]), "--out", str(run)),
            *("--data", str(out / "data/train.jsonl"), "--held-out", str(out / "data/development.jsonl")),
            *SAME_FOR_ALL,
            *row.options,
            *teacher,
            *(("--resume",) if (run / "settings.json").exists() else ()),
        ],
        check=True,
    )
