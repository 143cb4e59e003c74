"""Pairs to fine-tune on: bad lines are named before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.errors import DataError
from candor.finetune.data import load_pairs, require_apart

GOOD: dict[str, Any] = {
    "id": "a",
    "messages": [{"role": "user", "content": "Say yes."}],
    "reference": "yes",
    "verifier": "exact",
    "positive": "yes",
    "negative": "no",
}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_are_read(tmp_path: Path) -> None:
    (pair,) = load_pairs(written(tmp_path / "p.jsonl", GOOD))
    assert pair.is_right(" yes\n")
    assert not pair.is_right("yes!")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positive": "no"}, '"positive" is wrong by verifier "exact"'),
        ({"negative": "yes"}, '"negative" is right by verifier "exact"'),
        ({"negative": 3}, '"negative" must be a'),
        ({"verifier": "guess"}, "unknown verifier"),
        ({"messages": []}, '"messages" must be a non-empty list'),
        ({"reference": None}, '"reference" must be a string'),
        ({"extra": 1}, "unknown ['extra']"),
    ],
)
def test_the_line_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", GOOD, GOOD | change)
    with pytest.raises(DataError, match="line 2") as error:
        load_pairs(file)
    assert said in str(error.value)


def test_the_same_prompt_on_both_sides_is_refused(tmp_path: Path) -> None:
    other = GOOD | {"id": "b", "messages": [{"role": "user", "content": " Say  yes."}]}
    one, two = written(tmp_path / "1.jsonl", GOOD), written(tmp_path / "2.jsonl", other)
    with pytest.raises(DataError, match='first "b"'):
        require_apart(one, load_pairs(one), two, load_pairs(two))
