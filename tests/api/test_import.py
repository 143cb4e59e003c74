"""`import candor`: light, alone in its name, and the same for people, programs and type checkers."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import candor

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "library"
ROOMS = sorted(path.name for path in (ROOT / "candor").iterdir() if path.is_symlink())


@pytest.fixture
def python(tmp_path: Path) -> Any:
    """Runs Python in a folder where candor, and nothing else of this repository, is installed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "candor").symlink_to(ROOT / "candor")

    def run(folder: Path, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-W", "error", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_import_is_light(python: Any, tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import candor; dir(candor); "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert python(tmp_path, "-c", code) == "['candor']\n"


def test_a_name_brings_no_more_than_it_needs(python: Any, tmp_path: Path) -> None:
    code = (
        "import sys, candor; candor.judge, candor.calibrate, candor.load_bundle; "
        "print(sorted({'torch', 'fastapi', 'uvicorn', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert python(tmp_path, "-c", code) == "['torch']\n"


def test_names_are_found_where_the_type_checker_is_told() -> None:
    tree = ast.parse(Path(candor.__file__).read_text(encoding="utf-8"))
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(told) == sorted(candor.__all__)
    assert told == {name: home for home, names in candor._HOMES.items() for name in names}
    for name, home in told.items():
        assert home is not None
        assert getattr(candor, name) is getattr(import_module(home), name)
        assert name in dir(candor)


def test_every_name_stands_in_the_docstring() -> None:
    assert candor.__doc__ is not None
    assert [name for name in candor.__all__ if not re.search(rf"\b{name}\b", candor.__doc__)] == []


def test_another_name_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Judge'; it has Bundle, .*, load_bundle"):
        candor.Judge  # noqa: B018
    assert not hasattr(candor, "__wrapped__")


def test_it_stands_beside_a_project_with_packages_of_the_same_names(python: Any, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for room in ROOMS:
        (project / room).mkdir(parents=True)
        (project / room / "__init__.py").write_text(f'WHOSE = "their {room}"\n')
    (project / "engine" / "checks.py").write_text(
        "def same(response, reference):\n    return response == reference\n"
    )
    (project / "app" / "__main__.py").write_text(
        "import importlib, json, sys\n"
        "import candor\n"
        "from candor.calibration.verifiers import load_verifier\n"
        f"bundle = candor.load_bundle({str(ROOT / 'demo/bundle')!r})\n"
        "verdicts = candor.judge(bundle, [[0.0] * 1158], prompt_states=[[0.0] * 1152])\n"
        "verify = load_verifier('engine.checks:same')\n"
        f"whose = [importlib.import_module(room).WHOSE for room in {ROOMS}]\n"
        "print(json.dumps([verdicts.region.tolist(), verify('a', 'a'), verify('a', 'b'), whose]))\n"
    )
    found = json.loads(python(project, "-m", "app"))
    assert found == [["ood"], True, False, [f"their {room}" for room in ROOMS]]
    assert {"app", "engine", "sdm"} <= set(ROOMS)


def test_the_example_runs_and_shows_what_can_be_relied_on(python: Any) -> None:
    *_, last = python(EXAMPLE, "-m", "app").splitlines()
    read = re.fullmatch(r"of 400 new answers (\d+) are right; shown (\d+), right (\d+)", last)
    assert read is not None, last
    right, shown, right_shown = map(int, read.groups())
    assert shown > 100
    assert right_shown / shown >= 0.9 > right / 400


def test_the_example_check_labels_data_files_too(python: Any) -> None:
    code = (
        "from candor.calibration.verifiers import load_verifier\n"
        "verify = load_verifier('engine.checks:same_number')\n"
        "print(verify(' 7', '07'), verify('8', '7'), verify('seven', '7'))"
    )
    assert python(EXAMPLE, "-c", code) == "True False False\n"
