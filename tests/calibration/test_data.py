"""Every way in which labelled data can be wrong is named with its line; the rest is read as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.data import load_records, require_disjoint
from candor.calibration.errors import SHOWN, DataError

MESSAGES = [{"role": "user", "content": "Capital of France?"}]
TO_GENERATE = {"id": "a", "messages": MESSAGES, "reference": "Paris", "verifier": "exact"}
GIVEN = {"id": "b", "messages": MESSAGES, "response": "Rome", "label": 0}


def write(path: Path, *lines: Any) -> Path:
    """Strings and bytes as they are, everything else as JSON."""
    encoded = (
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    )
    path.write_bytes(b"\n".join(encoded))
    return path


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def messages(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_both_kinds_of_record_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "\ufeff" + json.dumps(TO_GENERATE), "", json.dumps(GIVEN) + "\r", "")
    first, second = load_records(path)
    assert (first.id, first.reference, first.verifier, first.response, first.label) == (
        "a",
        "Paris",
        "exact",
        None,
        None,
    )
    assert (second.id, second.response, second.label, second.verifier) == ("b", "Rome", 0, None)
    assert (first.line, second.line) == (1, 3)
    assert first.prompt == "Capital of France?"
    assert list(first.messages) == MESSAGES


def test_a_conversation_is_shown_with_its_roles(tmp_path: Path) -> None:
    turns = messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
    (record,) = load_records(write(tmp_path / "d.jsonl", TO_GENERATE | {"messages": turns}))
    assert record.prompt == "system: Be brief.\nuser: Hi\nassistant: Yes?\nuser: Bye"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "a"', "not JSON"),
        ('{"id": NaN}', "not JSON"),
        ('{"id": "a", "id": "b"}', "twice"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
        ('{"id": "\\ud800", "messages": []}', "surrogate"),
        ([1], "expected an object, got a list"),
        ("3", "expected an object, got a number"),
        ({}, 'missing "prompt" or "messages" (there are no columns)'),
        (without(TO_GENERATE, "verifier"), 'missing "verifier"'),
        (without(TO_GENERATE, "reference"), 'missing "reference"'),
        (without(GIVEN, "label"), 'missing "label"'),
        (without(GIVEN, "messages"), 'missing "prompt" or "messages"'),
        (
            without(GIVEN, "label") | {"lable": 1},
            'missing "label" (there are "id", "messages", "response", "lable")',
        ),
        (without(GIVEN, "response"), 'missing "response", the answer that the label is about'),
        (TO_GENERATE | {"id": 3.5}, '"id" must be a string or an integer, not a number'),
        (TO_GENERATE | {"id": True}, '"id" must be a string or an integer, not a boolean'),
        (TO_GENERATE | {"messages": "Hi"}, 'a single question goes into the column "prompt"'),
        (TO_GENERATE | {"messages": {"role": "user"}}, '"messages" must be a non-empty list, not an object'),
        (TO_GENERATE | {"messages": []}, 'missing "prompt" or "messages"'),
        (TO_GENERATE | {"messages": ["Hi"]}, '"messages"[0] must be {"role", "content"}'),
        (TO_GENERATE | {"messages": [{"role": "user"}]}, '"messages"[0] must be'),
        (TO_GENERATE | {"messages": messages(("user", 3))}, "content must be a string, not a number"),
        (
            TO_GENERATE | {"messages": messages(("robot", "Hi"))},
            "role must be one of system, user, assistant",
        ),
        (TO_GENERATE | {"messages": messages(([], "Hi"))}, "role must be one of"),
        (
            TO_GENERATE | {"messages": messages(("user", "Hi"), ("assistant", "Ho"))},
            "last message must be by the user",
        ),
        (TO_GENERATE | {"verifier": "exakt"}, 'unknown verifier "exakt"'),
        (TO_GENERATE | {"verifier": None}, 'missing "verifier"'),
        (TO_GENERATE | {"verifier": 1}, '"verifier" must be a string, not a number'),
        (TO_GENERATE | {"reference": {"a": 3}}, '"reference" must be a string'),
        (TO_GENERATE | {"reference": True}, '"reference" must be a string'),
        (TO_GENERATE | {"verifier": "regex", "reference": "("}, "not a regular expression"),
        (GIVEN | {"response": None}, 'missing "response"'),
        (GIVEN | {"response": 3}, '"response" must be a string, not a number'),
        (GIVEN | {"label": 2}, "or unknown; not 2"),
        (GIVEN | {"label": 0.5}, "or unknown; not 0.5"),
        (GIVEN | {"label": "maybe"}, 'or unknown; not "maybe"'),
        (GIVEN | {"label": [1]}, "or unknown; not [1]"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "d.jsonl", TO_GENERATE | {"id": "good"}, line)
    with pytest.raises(DataError) as caught:
        load_records(path)
    message = str(caught.value)
    assert f"{path}: 1 problem\n  line 2: " in message
    assert says in message
    assert "run again" in message


def test_many_bad_lines_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *["{"] * (SHOWN + 5))
    with pytest.raises(DataError) as caught:
        load_records(path)
    message = str(caught.value)
    assert f"{SHOWN + 5} problems" in message
    assert f"line {SHOWN}:" in message
    assert f"line {SHOWN + 1}:" not in message
    assert "... and 5 more" in message


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", TO_GENERATE, GIVEN, GIVEN | {"id": "a"})
    with pytest.raises(DataError, match='line 3: id "a" stands on line 1 already'):
        load_records(path)


def test_one_given_answer_with_two_labels_names_both_lines(tmp_path: Path) -> None:
    same = GIVEN | {"id": "c", "label": 1, "messages": messages(("user", " Capital  of\nFrance?"))}
    with pytest.raises(
        DataError, match="line 2: label 1, but line 1 has the same prompt and response with label 0"
    ):
        load_records(write(tmp_path / "d.jsonl", GIVEN, same))


def test_one_given_answer_with_one_label_may_stand_twice(tmp_path: Path) -> None:
    other_answer = GIVEN | {"id": "d", "response": "Paris", "label": 1}
    assert len(load_records(write(tmp_path / "d.jsonl", GIVEN, GIVEN | {"id": "c"}, other_answer))) == 3


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="holds no record; a record has"):
        load_records(write(tmp_path / "d.jsonl", content))


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "missing.jsonl", "cannot be read"),
        (tmp_path, "is a folder, but not of a data set"),
    ):
        with pytest.raises(DataError, match=says):
            load_records(path)


def test_the_same_prompt_is_known_in_other_spacing_and_another_in_other_case(tmp_path: Path) -> None:
    variants = [
        messages(("user", "Capital of France?")),
        messages(("user", "  Capital\tof\n France? ")),
        messages(("user", "capital of france?")),
        messages(("user", "Capital ofFrance?")),
        messages(("user", "Capital of France")),
        messages(("system", ""), ("user", "Capital of France?")),
    ]
    lines = [TO_GENERATE | {"id": str(i), "messages": turns} for i, turns in enumerate(variants)]
    digests = [record.prompt_digest for record in load_records(write(tmp_path / "d.jsonl", *lines))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_a_prompt_in_two_files_is_refused(tmp_path: Path) -> None:
    fit_path = write(tmp_path / "fit.jsonl", TO_GENERATE)
    path = write(
        tmp_path / "test.jsonl",
        TO_GENERATE | {"id": "x", "messages": messages(("user", "Other?"))},
        TO_GENERATE | {"id": "y", "messages": messages(("user", "Capital of  France?"))},
    )
    fit, test = load_records(fit_path), load_records(path)
    require_disjoint(fit_path, fit, path, test[:1])
    with pytest.raises(DataError, match=rf"line 2: same prompt as line 1 of {fit_path}"):
        require_disjoint(fit_path, fit, path, test)
