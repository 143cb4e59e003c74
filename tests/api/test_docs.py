"""What docs/python.md and the docstrings of the public API show is what happens."""

from __future__ import annotations

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import candor

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "python.md"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_document() -> None:
    found = doctest.testfile(str(DOCUMENT), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 30
    assert found.failed == 0


@pytest.mark.parametrize("name", ["calibrating", "judging"])
def test_the_docstrings(name: str) -> None:
    found = doctest.testmod(import_module(f"candor.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 4
    assert found.failed == 0


def test_every_name_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [name for name in candor.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_example_with_a_model(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(with .*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], {"candor": candor, "bundle": candor.load_bundle("demo/bundle")})
    said = capsys.readouterr().out
    assert said == "high False True\n"
    assert f"# {said}" in blocks[0]
