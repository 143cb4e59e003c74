"""docs/architecture.md draws the rooms as the import contract has them, and names the files that a request walks."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_every_folder_has_its_line() -> None:
    cells = re.findall(r"^\| (`.+?) \|", DOCUMENT.split("\n## ")[1], re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(\w+)/`", cell)]
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {
        "docker",
        "docs",
        "requirements",
        "tests",
    }
    assert sorted(listed) == sorted(there)


def test_the_drawing_has_the_layers_of_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [layers] = [
        one["layers"] for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "layers"
    ]
    drawing = DOCUMENT.split("```")[1]
    expected = re.findall(r"\w+", " ".join(layers).replace("candor.", ""))
    assert re.findall(r"(\w+)/", drawing) == expected


def test_a_request_walks_through_the_files_that_are_named() -> None:
    """`python -m benchmarks.walk` sends one over HTTP and prints the files whose functions ran for it."""
    section = DOCUMENT.split("\n## One request's life\n")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", section, re.MULTILINE) == [str(number) for number in range(1, 11)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.walk"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    on_the_loop = done.stdout.split(" files beside it")[0]
    walked = set(re.findall(r"\S+\.py", on_the_loop))
    assert walked, done.stdout
    assert walked <= set(re.findall(r"`(\S+\.py)`", section))
