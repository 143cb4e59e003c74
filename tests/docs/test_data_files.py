"""docs/results/data-files.md says what is said of each file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.files import tables

PAGE = Path(__file__).resolve().parents[2] / "docs/results/data-files.md"


def test_the_page_says_what_is_said() -> None:
    pytest.importorskip("datasets")
    assert PAGE.read_text(encoding="utf-8").endswith("\n\n" + tables() + "\n")
