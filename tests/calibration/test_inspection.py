"""`candor data check` on files made to show each thing that it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from candor.app.cli import cli
from candor.calibration.certificate import Claim
from candor.calibration.inspection import certificate_line, languages, near_twins


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["data", "check", *map(str, arguments)])


def given(numbers: range, right_of: int = 2) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {i}?", "response": f"It is {i}.", "label": i % right_of == 0} for i in numbers
    ]


def test_what_is_said_of_good_data(tmp_path: Path) -> None:
    data, test = (
        write(tmp_path / "d.jsonl", given(range(600))),
        write(tmp_path / "t.jsonl", given(range(600, 700))),
    )
    done = check(data, test)
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == f"{data}: 600 records from JSON Lines"
    assert "prompts: 600 different" in lines
    assert "labels: 600 given, 50.0% right [45.9%, 54.1%]" in lines
    assert "languages, roughly: English 100%" in lines
    assert "region at alpha 0.9: possible (600 prompts, at least 64 with 50% of the rarer label)" in lines
    assert any(
        line.startswith("certificate of 0.95 at delta 0.05: possible (240 prompts set aside")
        for line in lines
    )
    told = json.loads(check(data, test, "--json").stdout)
    assert (told["fine"], told["files"][str(data)]["prompts"], told["shared"]) == (True, 600, {})


def test_leaks_duplicates_and_twins(tmp_path: Path) -> None:
    long = "Why did the old lighthouse keeper of the northern island never leave his tower in winter?"
    rows = given(range(200))
    rows += [
        {"prompt": "what is 1?", "response": "x", "label": 0},
        {"prompt": "What  is 2?", "response": "y", "label": 0},
    ]
    rows += [
        {"prompt": long, "response": "z", "label": 1},
        {"prompt": long.replace("winter", "summer"), "response": "z", "label": 1},
    ]
    data = write(tmp_path / "d.jsonl", rows)
    test = write(
        tmp_path / "t.jsonl",
        [*given(range(199, 202)), {"prompt": f"{long} Say.", "response": "z", "label": 1}],
    )
    done = check(data, test)
    assert done.exit_code == 1
    assert "prompts: 203 different, 1 records repeat one of them" in done.stdout
    assert "1 pairs of prompts differ in case alone, for example line 2 and line 201" in done.stdout
    assert "1 pairs of prompts differ little, for example line 203 and line 204" in done.stdout
    assert f"1 prompts stand in both {data} and {test}" in done.stdout
    assert f"1 prompts are near twins in {data} and {test}" in done.stdout


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            given(range(40)),
            "region at alpha 0.9: not possible (40 prompts, at least 80 with 50% of the rarer label)",
        ),
        (given(range(400), 1), "region at alpha 0.9: not possible (all labels are the same)"),
        (given(range(400), 20), "not possible (400 prompts, at least 800 with 5% of the rarer label)"),
    ],
)
def test_too_little_is_said(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    done = check(write(tmp_path / "d.jsonl", rows), "--alpha", "0.9")
    assert says in done.stdout
    assert done.exit_code == 1


def test_references_that_are_nearly_always_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "reference": "yes" if i % 5 else "no"} for i in range(200)]
    done = check(write(tmp_path / "d.jsonl", rows), "--verifier", "choice(yes, no)")
    assert "80% of the references are 'yes': whoever always says so is right as often" in done.stdout
    assert "verifier choice(yes, no): 200 records" in done.stdout


def test_a_verifier_that_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(response, reference):\n    return None\n")
    rows = [{"prompt": f"q{i}", "reference": "a"} for i in range(200)]
    done = check(write(tmp_path / "d.jsonl", rows), "--verifier", "mine.py:f")
    assert done.exit_code == 1
    assert "tried before any answer" in done.stderr


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of Italy?", "English"),
        ("Was ist die Hauptstadt von Italien?", "German"),
        ("Quelle est la capitale de l'Italie et de la France ?", "French"),
        ("¿Cuál es la capital de los Países Bajos?", "Spanish"),
        ("Столица Италии?", "Cyrillic script"),
        ("イタリアの首都は", "Japanese"),
        ("意大利的首都是什么", "Chinese"),
        ("48 / 2 = ?", "no letters"),
        ("xqzv", "Latin script"),
    ],
)
def test_languages_roughly(text: str, language: str) -> None:
    assert languages([text]) == {language: 1.0}


def test_a_shared_instruction_makes_no_twins() -> None:
    instruction = "Is the sentiment of this product review positive or negative? Answer with one word."
    prompts = [(str(i), f"{instruction} item{i} is w{i} and v{i} or u{i}") for i in range(200)]
    assert near_twins(prompts) == []


@pytest.mark.parametrize(
    ("apart", "says"),
    [
        (58, "not possible"),
        (59, "possible, if 59 of 59"),
        (300, "100, at most 1 of them"),
        (3000, "at most 38 of them"),
    ],
)
def test_what_a_certificate_takes(apart: int, says: str) -> None:
    """59 without an error, 93 with one and 124 with two (docs/calibration.md)."""
    assert says in certificate_line(apart, Claim(0.95, 0.05))
