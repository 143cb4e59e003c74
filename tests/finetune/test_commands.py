"""`candor finetune` and `candor data word-ordering`: what is said of bad input, and what files come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.calibration.data import load_records
from candor.finetune.data import load_pairs

RUNNER = CliRunner()
NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
THINGS = ("boat", "coat", "door", "lamp", "road", "song", "tree", "wall")


def sentences(path: Path) -> Path:
    lines = [
        f"{a} gave {b} one {c} for two {d}s." for a in NAMES for b in NAMES for c in THINGS for d in THINGS
    ]
    path.write_text("\n".join(line for line in lines))
    return path


def test_word_ordering_data_are_pairs_and_records(tmp_path: Path) -> None:
    sizes = ["--train", "4", "--development", "2", "--calibration", "3", "--test", "2", "--shifted", "0"]
    source = sentences(tmp_path / "s.txt")
    other = tmp_path / "h.txt"
    other.write_text("The birch canoe slid on the smooth planks.\n")
    asked = ["--sentences", str(source), "--words", "2-3", "--also-test", f"harvard={other}"]
    out = tmp_path / "data"
    result = RUNNER.invoke(cli, ["data", "word-ordering", *asked, *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(load_pairs(out / "train.jsonl")) == 4
    assert len(load_pairs(out / "development.jsonl")) == 2
    assert [record.id for record in load_records(out / "calibration.jsonl")] == [
        pair.id for pair in load_pairs(out / "calibration-pairs.jsonl")
    ]
    assert len(load_records(out / "harvard.jsonl")) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--words", "three"], "expected a number or a range such as 2-5"),
        (["--words", "3-2"], "expected a number or a range such as 2-5"),
        (["--also-test", "harvard"], "expected NAME=FILE"),
        (["--train", "100000"], "expected 100000 prompts for train"),
        (["--sentences", "none.txt"], "none.txt cannot be read"),
    ],
)
def test_data_says_what_is_wrong(options: list[str], said: str, tmp_path: Path) -> None:
    source = ["--sentences", str(sentences(tmp_path / "s.txt")), "--out", str(tmp_path / "data")]
    result = RUNNER.invoke(cli, ["data", "word-ordering", *source, *options])
    assert result.exit_code != 0
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "data").exists()


def test_finetune_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "a"}) + "\n")
    files = ["--data", str(file), "--held-out", str(file), "--out", str(tmp_path / "run")]
    result = RUNNER.invoke(cli, ["finetune", "--model", str(tmp_path), *files])
    assert result.exit_code == 1
    assert "line 1" in result.output
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    files = ["--data", "none", "--held-out", "none", "--out", str(tmp_path / "run")]
    result = RUNNER.invoke(cli, ["finetune", "--model", str(tmp_path), *files, "--checkpoint-every", "5"])
    assert result.exit_code == 2
    assert "multiple" in result.output
