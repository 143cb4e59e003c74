"""Pairs to fine-tune on: bad lines are named before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.errors import DataError
from candor.finetune.data import PairReading, load_pairs, require_apart

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


def test_columns_are_named_and_the_reference_is_the_positive(tmp_path: Path) -> None:
    file = tmp_path / "preferences.csv"
    file.write_text("question,chosen,rejected,rater\nSay yes.,yes,no,7\nSay no.,no,yes,8\n")
    reading = PairReading.parse("reference=chosen, negative=rejected", "choice(yes, no)")
    pairs = load_pairs(file, reading)
    assert [(pair.messages[0]["content"], pair.positive, pair.negative) for pair in pairs] == [
        ("Say yes.", "yes", "no"),
        ("Say no.", "no", "yes"),
    ]
    assert all(pair.is_right(pair.positive) and not pair.is_right(pair.negative) for pair in pairs)
    with pytest.raises(DataError, match=r'line 2: "rejected" is wrong by verifier'):
        load_pairs(file, PairReading.parse("reference=chosen, positive=rejected, negative=chosen", "exact"))
    with pytest.raises(DataError, match=r'line 2: "worse" must be a string'):
        load_pairs(file, PairReading.parse("reference=chosen, negative=worse", "exact"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positive": "no"}, '"positive" is wrong by verifier "exact"'),
        ({"negative": "yes"}, '"negative" is right by verifier "exact"'),
        ({"negative": 3}, '"negative" must be a'),
        ({"verifier": "guess"}, "unknown verifier"),
        ({"messages": []}, 'missing "prompt" or "messages"'),
        ({"reference": None}, '"reference" must be a string'),
        ({"reference": None, "verifier": None, "response": "yes", "label": 1}, 'in place of "response"'),
    ],
)
def test_the_line_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", GOOD, GOOD | {"id": "b"} | change)
    with pytest.raises(DataError, match="line 2") as error:
        load_pairs(file)
    assert said in str(error.value)


def test_the_same_prompt_on_both_sides_is_refused(tmp_path: Path) -> None:
    other = GOOD | {"id": "b", "messages": [{"role": "user", "content": " Say  yes."}]}
    one, two = written(tmp_path / "1.jsonl", GOOD), written(tmp_path / "2.jsonl", other)
    with pytest.raises(DataError, match='first "b"'):
        require_apart(one, load_pairs(one), two, load_pairs(two))
