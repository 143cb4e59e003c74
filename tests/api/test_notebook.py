"""examples/python.ipynb runs as it stands, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/python.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(monkeypatch: pytest.MonkeyPatch, *, model: bool) -> dict[str, Any]:
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        if model or "model" not in cell["metadata"].get("tags", ()):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_it_runs_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(monkeypatch, model=False)
    assert [record.reference for record in names["records"]] == ["Paris", "Rome"]
    assert names["known"].mean() > 0.2
    assert names["labels"][:400][names["known"]].mean() > 0.9


def test_it_runs_with_the_demo_model(monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    assert demo_model == ROOT / "var/models/smollm2-135m-word-ordering"
    run(monkeypatch, model=True)


def test_it_was_run_to_its_end() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    assert not [out for cell in cells() for out in cell["outputs"] if out["output_type"] == "error"]
