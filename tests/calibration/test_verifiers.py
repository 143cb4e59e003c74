"""Verifiers against cases worked out by hand, and every way in which one cannot be used."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import candor
from candor.calibration.data import load_records
from candor.calibration.errors import DataError, VerifierError
from candor.calibration.verifiers import Question, load_verifier, reference_problem, without_folders
from candor.finetune.data import load_pairs


@pytest.mark.parametrize(
    ("verifier", "response", "reference", "follows"),
    [
        ("exact", "Paris", "Paris", True),
        ("exact", "  Paris\n", "Paris ", True),
        ("exact", "paris", "Paris", False),
        ("exact", "Pa ris", "Paris", False),
        ("exact", "a  b", "a b", False),
        ("exact", "", "", True),
        ("normalised", "A  big\n DOG", "a big dog", True),
        ("normalised", "Straße", "STRASSE", True),
        ("normalised", "cafe\u0301", "caf\u00e9", True),
        ("normalised", "x\u00b2", "x2", False),  # NFC, not NFKC: a superscript is no digit
        ("normalised", "-5", "5", False),
        ("normalised", "abig dog", "a big dog", False),
        ("regex", "the answer is 42.", r"\b42\b", True),
        ("regex", "the answer is 142.", r"\b42\b", False),
        ("regex", "no", r"^yes$", False),
        ("regex", "anything", "", True),
        ("json", '{"a": [1, 2], "b": null}', {"b": None, "a": [1, 2]}, True),
        ("json", " [1.0]\n", [1], True),
        ("json", "[true]", [1], False),
        ("json", "[1]", [True], False),
        ("json", "0", False, False),
        ("json", "false", False, True),
        ("json", "[1, 2]", [2, 1], False),
        ("json", "[1]", [1, 2], False),
        ("json", '{"a": 1}', {"a": 1, "b": 2}, False),
        ("json", '{"a": 1, "a": 1}', {"a": 1}, False),
        ("json", "NaN", None, False),
        ("json", "null", None, True),
        ("json", '"text"', "text", True),
        ("json", "text", "text", False),
        ("json", "", None, False),
        ("json", "[" * 100_000, [], False),
        ("json", "9" * 10_000, 9, False),
        ("json", '"\\ud800"', "x", False),
        ("exact", "Rome", ["Roma", "Rome"], True),
        ("normalised", "roma", ["Roma", "Rome"], True),
        ("exact", "roma", ["Roma", "Rome"], False),
        ("contains", "It is Paris, I think.", "paris", True),
        ("contains", "It is Parisian.", "Paris", False),
        ("contains", "15", "5", False),
        ("contains", "a C++ one", "c++", True),
        ("contains", "New  York", ["Boston", "new york"], True),
        ("number", "The answer is 1,234.50 dollars.", "1234.5", True),
        ("number", "It is 3, so 4.", 3, False),
        ("number", "10-5", "5", True),
        ("number", "-5", "5", False),
        ("number", "\u22125", -5, True),
        ("number", "none", 0, False),
        ("number", "1e3", "1000", True),
        ("number", ".5", 0.5, True),
        ("number", "0.3000000001", 0.3, True),
        ("number", "1,2", 12, False),
        ("number", "72", "He sold 48 + 24.\n#### 72", True),
        ("number(0.01)", "3.15", "3.14", True),
        ("number(0.01)", "3.16", "3.14", False),
        ("number(1%)", "101", "100", True),
        ("number(1%)", "102", "100", False),
        ("number(1%)", "-100.5", -100, True),
        ("json_schema", '{"a": 1}', {"type": "object", "required": ["a"]}, True),
        ("json_schema", '{"b": 1}', {"type": "object", "required": ["a"]}, False),
        ("json_schema", "a", {"type": "object"}, False),
    ],
)
def test_built_in_verifiers(verifier: str, response: str, reference: Any, follows: bool) -> None:
    assert load_verifier(verifier)(response, reference) is follows


@pytest.mark.parametrize(
    ("verifier", "reference", "says"),
    [
        ("exact", 3, "must be a string"),
        ("normalised", None, "must be a string"),
        ("regex", ["a"], "must be a string"),
        ("regex", "(", "not a regular expression"),
        ("regex", "a{99999999999999999999}", "not a regular expression"),
        ("exact", "(", None),
        ("json", {"any": "value"}, None),
        ("some.module:function", 3, None),
        ("exact", ["a", 3], "must be a string"),
        ("exact", [], "must be a string"),
        ("number", "many", "must be a number"),
        ("number(1%)", True, "must be a number"),
        ("number", "1,000", None),
        ("json_schema", "x", "must be a JSON schema"),
        ("json_schema", {"type": "objekt"}, "is no JSON schema"),
    ],
)
def test_references_are_checked_against_their_verifier(
    verifier: str, reference: Any, says: str | None
) -> None:
    problem = reference_problem(verifier, reference)
    assert problem is None if says is None else problem is not None and says in problem


def test_a_function_in_a_file_and_one_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def ends_with(response, reference):\n    return response.endswith(reference['end'])\n"
    (tmp_path / "mine_of_candor_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/mine_of_candor_test.py:ends_with", "mine_of_candor_test:ends_with"):
        verify = load_verifier(name)
        assert verify("the end", {"end": "end"}) is True
        assert verify("the end.", {"end": "end"}) is False


@pytest.mark.parametrize(
    ("code", "function", "says"),
    [
        (None, "f", "not found"),
        ("def f(:\n", "f", "SyntaxError"),
        ("raise RuntimeError('at import')\n", "f", "at import"),
        ("f = 3\n", "f", "no function"),
        ("def g(response, reference): return True\n", "f", "no function"),
        ("def f(response): return True\n", "f", "must take"),
        ("def f(response, *, reference): return True\n", "f", "must take"),
    ],
)
def test_a_callable_that_cannot_be_loaded(tmp_path: Path, code: str | None, function: str, says: str) -> None:
    path = tmp_path / "verifier.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(VerifierError, match=says):
        load_verifier(f"{path}:{function}")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('x')", "failed with KeyError"),
        ("return 1", "must return True, False or"),
        ("pass", "None"),
    ],
)
def test_a_callable_that_fails_on_an_answer(tmp_path: Path, body: str, says: str) -> None:
    path = tmp_path / "verifier.py"
    path.write_text(f"def f(response, reference):\n    {body}\n")
    verify = load_verifier(f"{path}:f")
    with pytest.raises(VerifierError, match=says):
        verify("response", "reference")


CHOICES = ["positive", "negative", "not positive"]


@pytest.mark.parametrize(
    ("response", "answer", "options", "follows"),
    [
        ("Positive.", "positive", CHOICES, True),
        ("It is negative", "positive", CHOICES, False),
        ("positive or negative", "positive", CHOICES, False),
        ("not positive", "positive", CHOICES, False),
        ("not positive", "not positive", CHOICES, True),
        ("neither", "positive", CHOICES, False),
        ("B", "B", ["A", "B"], True),
        ("(B) Rome", "B", ["A", "B"], True),
        ("It is a B", "B", ["A", "B"], True),
        ("b", "B", ["A", "B"], False),
        ("A and B", "B", ["A", "B"], False),
    ],
)
def test_a_choice(response: str, answer: str, options: list[str], follows: bool) -> None:
    assert load_verifier("choice")(response, {"answer": answer, "options": options}) is follows


def test_where_options_come_from(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"verifier": "choice(A, B)", "reference": "B"},
        {"verifier": "choice", "reference": "B", "choices": {"text": ["Rome", "Paris"], "label": ["A", "B"]}},
        {"verifier": "choice", "reference": "B", "options": ["A", "B"]},
        {"verifier": "choice", "reference": "B", "options": "A|B"},
    ]
    lines = [json.dumps({"prompt": f"q{i}"} | row) for i, row in enumerate(rows)]
    for record in load_records(write(tmp_path / "d.jsonl", "\n".join(lines))):
        assert record.reference == {"answer": "B", "options": ["A", "B"]}
    for row, says in (
        ({"verifier": "choice", "reference": "B"}, 'needs the options: --verifier "choice(A, B, C)"'),
        ({"verifier": "choice(A, B)", "reference": "C"}, "must be one of A, B, not"),
    ):
        with pytest.raises(DataError) as raised:
            load_records(write(tmp_path / "d.jsonl", json.dumps({"prompt": "q"} | row)))
        assert says in str(raised.value)


def test_a_schema_in_a_file_needs_no_reference(tmp_path: Path) -> None:
    write(tmp_path / "city.json", json.dumps({"type": "object", "required": ["city"]}))
    data = write(tmp_path / "d.jsonl", json.dumps({"prompt": "q", "verifier": "json_schema(city.json)"}))
    (record,) = load_records(data)
    assert record.verifier is not None
    verify = load_verifier(record.verifier, record.folder)
    assert [verify(said, None) for said in ('{"city": "Rome"}', "{}", "Rome")] == [True, False, False]
    for content, says in (
        ("{", "is not JSON"),
        ('{"type": 3}', "is no JSON schema"),
        (None, "was not found in"),
    ):
        if content is not None:
            write(tmp_path / "bad.json", content)
        with pytest.raises(VerifierError, match=says):
            load_verifier("json_schema(bad.json)" if content else "json_schema(none.json)", tmp_path)
        load_verifier.cache_clear()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ann/checks.py:same", "checks.py:same"),
        ("judge(/home/ann/judge.toml)", "judge(judge.toml)"),
        ("engine.checks:same", "engine.checks:same"),
        ("number(1%)", "number(1%)"),
    ],
)
def test_a_report_shows_no_folders(name: str, shown: str) -> None:
    assert without_folders(name) == shown


@pytest.mark.parametrize("name", ["number(x)", "number(-1)", "number(1%%)", "number(inf)"])
def test_tolerances_that_are_none(name: str) -> None:
    with pytest.raises(VerifierError, match="the tolerance is a number"):
        load_verifier(name)


RICH = """
import numpy
async def later(response, reference):
    return response == reference
def numpys(response, reference):
    return numpy.array([response == reference])[0]
def whole(response, reference, prompt, record):
    return (prompt, record["level"], response) == ("2 + 2?", 3, reference)
def unsure(response, reference, record):
    return "unknown"
def asks(response, reference, *, prompt):
    return prompt == "2 + 2?"
"""


def test_functions_may_be_async_and_see_prompt_and_record(tmp_path: Path) -> None:
    write(tmp_path / "rich.py", RICH)
    row = {"prompt": "2 + 2?", "reference": "4", "level": 3}
    names = ["later", "numpys", "whole", "unsure", "asks"]
    verdicts = []
    for name in names:
        data = write(tmp_path / "d.jsonl", json.dumps(row | {"verifier": f"rich.py:{name}"}))
        (record,) = load_records(data)
        assert record.verifier is not None
        question = Question("4", record.reference, record.messages, record.row)
        verdicts.append(asyncio.run(load_verifier(record.verifier, record.folder).label(question)))
    assert verdicts == [True, True, True, None, True]
    assert all(type(verdict) is bool for verdict in verdicts if verdict is not None)


@pytest.mark.parametrize("name", ["", "exakt", "Exact"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(
        VerifierError, match="exact, normalised, contains, choice, number, regex, json, json_schema"
    ):
        load_verifier(name)


def test_a_module_that_is_not_installed() -> None:
    with pytest.raises(VerifierError, match="cannot be imported"):
        load_verifier("no_such_module_of_candor:f")


SAME = "def same(response, reference):\n    return response == reference\n"
AS_THE_COMMAND = """
import sys
from pathlib import Path
from candor.calibration.data import load_records
from candor.calibration.verifiers import load_verifier
for record in load_records(Path(sys.argv[1])):
    verify = load_verifier(record.verifier, record.folder)
    print(record.verifier, verify("x", record.reference), verify("y", record.reference))
import engine, candor.engine.answer
print(engine.__file__)
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def records(path: Path, *verifiers: str, reference: str = "x") -> Path:
    lines = [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": f"question {number}"}],
            "reference": reference,
            "verifier": verifier,
        }
        for number, verifier in enumerate(verifiers)
    ]
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("package", ["__init__.py", "README.md"])
def test_a_users_own_packages_are_found_whatever_they_are_called(tmp_path: Path, package: str) -> None:
    """As `candor` runs: the path begins with its script's folder. Our rooms' names are free for the user's."""
    project, installed = tmp_path / "project", tmp_path / "installed"
    for room in ("app", "engine"):
        write(project / room / package, "")
    write(project / "engine/checks.py", f"from app.helper import same as helped\n{SAME}")
    write(project / "app/helper.py", SAME)
    write(project / "here.py", SAME)
    lazy = "def later(response, reference):\n    from only_beside import same\n    return same(response, reference)\n"
    write(project / "data/beside.py", SAME + lazy)
    write(project / "data/only_beside.py", SAME)
    named = ["engine.checks:same", "engine.checks:helped", "here:same", "here.py:same"]
    named += ["beside:same", "beside:later", "beside.py:same"]
    data = records(project / "data/train.jsonl", *named)
    write(installed / "here.py", "raise RuntimeError('not the one that is meant')\n")
    (installed / "candor").symlink_to(Path(candor.__file__).parent)
    done = subprocess.run(
        [sys.executable, write(tmp_path / "bin/candor", AS_THE_COMMAND), data.relative_to(project)],
        cwd=project,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    *lines, engine = done.stdout.splitlines()
    assert lines == [f"{name} True False" for name in named]
    assert engine == str(project / "engine/__init__.py" if package == "__init__.py" else None)


def test_a_verifier_beside_the_data_is_preferred_to_one_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "preferred.py", "def f(response, reference):\n    return False\n")
    write(tmp_path / "data/preferred.py", "def f(response, reference):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for name in ("preferred.py:f", "preferred:f"):
        (record,) = load_records(records(tmp_path / "data/d.jsonl", name))
        assert record.verifier is not None
        assert load_verifier(record.verifier, record.folder)("", "")
    assert sys.path[: len(before)] == before


def test_pairs_to_fine_tune_on_find_theirs_too(tmp_path: Path) -> None:
    write(tmp_path / "of_pairs.py", SAME)
    pair = {
        "id": "a",
        "messages": [{"role": "user", "content": "?"}],
        "reference": "x",
        "verifier": "of_pairs:same",
        "positive": "x",
        "negative": "y",
    }
    (made,) = load_pairs(write(tmp_path / "pairs.jsonl", json.dumps(pair)))
    assert made.is_right("x")
    assert not made.is_right("y")


def test_where_a_verifier_was_sought_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = records(tmp_path / "data/d.jsonl", "nowhere_of_candor:f", "nowhere.py:f")
    with pytest.raises(DataError) as raised:
        load_records(data)
    for line in str(raised.value).splitlines()[1:3]:
        assert f"looked in {tmp_path / 'data'} and {tmp_path}" in line


def test_a_module_that_another_of_its_name_stands_in_for_is_refused(tmp_path: Path) -> None:
    """Not taken for the other: it might have a function of that name, and label wrongly."""
    for side in ("one", "other"):
        write(tmp_path / side / "twice_of_candor.py", SAME)
    load_records(records(tmp_path / "one/d.jsonl", "twice_of_candor:same"))
    with pytest.raises(
        DataError, match=r"other/twice_of_candor\.py, but .*one/twice_of_candor\.py is imported"
    ):
        load_records(records(tmp_path / "other/d.jsonl", "twice_of_candor:same"))
    write(tmp_path / "one/json.py", SAME)
    with pytest.raises(VerifierError, match="rename yours"):
        load_verifier("json:same", tmp_path / "one")
