"""README is short, and what it shows is what a served demo answers. What it names: tests/docs/test_documents.py."""

from __future__ import annotations

import json
import math
import re
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from candor.app.edge.schemas.reliability import ReliabilityResult
from tests.demo.test_serving import Server, server

__all__ = ["server"]

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_BYTES = 6000


def shown() -> Any:
    match = re.search(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert match
    return json.loads(match[1])


def test_it_is_short() -> None:
    assert len(README.encode()) <= MOST_BYTES


def test_every_field_shown_is_explained_and_exists() -> None:
    [result] = shown()["reliability"]["results"]
    explained = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert explained == list(result)
    assert len(explained) == 6
    assert set(explained) <= set(ReliabilityResult.model_fields)


def test_the_figures_are_marked_for_whoever_measures_them_anew() -> None:
    _, after = README.split("<!-- figures -->\n")
    table, _ = after.split("<!-- /figures -->")
    assert all(line.startswith("|") for line in table.splitlines())


def test_the_answer_shown_is_the_answer_given(server: Server) -> None:
    [command] = re.findall(r"^curl .*?^}'$", README, re.MULTILINE | re.DOTALL)
    words = shlex.split(command)
    url = next(word for word in words if word.startswith("http"))
    header = words[words.index("-H") + 1].split(": ")
    request = urllib.request.Request(
        url.replace("http://127.0.0.1:8000", server.url),
        words[words.index("-d") + 1].encode(),
        dict([header]),
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        given = json.load(response)
    assert agrees(shown(), given), given


def test_a_stock_client_gets_what_is_said(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    document = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    section = document.split("\n## From a stock client\n")[1].split("\n## ")[0]
    [program] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in program
    exec(program.replace("http://127.0.0.1:8000", server.url), {})
    refusal, _ = capsys.readouterr().out.splitlines()
    assert f"# {refusal}\n" in program


def agrees(shown: Any, given: Any) -> bool:
    """Whether all that is shown was given: numbers within a twentieth, since states vary with the machine."""
    if isinstance(shown, dict):
        return all(name in given and agrees(value, given[name]) for name, value in shown.items())
    if isinstance(shown, list):
        return len(shown) == len(given) and all(map(agrees, shown, given))
    if isinstance(shown, int | float) and not isinstance(shown, bool):
        return math.isclose(shown, given, rel_tol=0.05, abs_tol=0.05)
    return bool(shown == given)


@pytest.mark.parametrize(
    ("shown", "given", "expected"),
    [
        ({"a": [1.0]}, {"a": [1.04], "b": None}, True),
        ({"a": [1.0]}, {"a": [1.11]}, False),
        ({"a": 350}, {"a": 340}, True),
        ({"a": 350}, {"a": 300}, False),
        ({"a": "high"}, {"a": "low"}, False),
        ({"a": None}, {}, False),
        ([1], [1, 2], False),
    ],
)
def test_agreement(shown: Any, given: Any, expected: bool) -> None:
    assert agrees(shown, given) is expected
