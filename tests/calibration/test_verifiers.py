"""Verifiers against cases worked out by hand, and every way in which one cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from candor.calibration.errors import VerifierError
from candor.calibration.verifiers import load_verifier, reference_problem


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
        ("return 1", "must return True or False"),
        ("pass", "None"),
    ],
)
def test_a_callable_that_fails_on_an_answer(tmp_path: Path, body: str, says: str) -> None:
    path = tmp_path / "verifier.py"
    path.write_text(f"def f(response, reference):\n    {body}\n")
    verify = load_verifier(f"{path}:f")
    with pytest.raises(VerifierError, match=says):
        verify("response", "reference")


@pytest.mark.parametrize("name", ["", "exakt", "Exact"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(VerifierError, match="exact, normalised, regex, json"):
        load_verifier(name)


def test_a_module_that_is_not_installed() -> None:
    with pytest.raises(VerifierError, match="cannot be imported"):
        load_verifier("no_such_module_of_candor:f")
