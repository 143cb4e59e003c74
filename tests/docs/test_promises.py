"""Every promise to whoever runs or attacks a server has beside it a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def promises(document: str, heading: str) -> dict[str, str]:
    """Each row of a table whose last column has this heading, and what stands in that column."""
    found, within = {}, False
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            within = False
        elif cells[-1] == heading:
            within = True
        elif within and not set(line) <= set("|-"):
            found[" | ".join(cells[:-1])] = cells[-1]
    return found


@pytest.mark.parametrize(("document", "least"), [("docs/security.md", 25), ("docs/runbook.md", 15)])
def test_every_promise_is_shown_by_a_test_that_exists(document: str, least: int) -> None:
    rows = promises(document, "shown by")
    assert len(rows) >= least
    for promise, shown in rows.items():
        named = re.findall(r"((?:`test_\w+`(?:, )?)+) in `(tests/[\w/]+\.py)`", shown)
        assert named, f"{document}: no test beside {promise!r}"
        assert len(re.findall(r"`test_\w+`", shown)) == sum(
            len(re.findall("`", names)) // 2 for names, _ in named
        )
        for names, file in named:
            text = (ROOT / file).read_text(encoding="utf-8")
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in text, f"{document}: {file} has no {name}"
