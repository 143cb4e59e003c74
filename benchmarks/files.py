"""What a user reads of files of every kind, and of broken ones: the tables of docs/results/data-files.md.

    python -m benchmarks.files

The files are those of tests/calibration/test_sources.py; a test holds the document to what is said here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from candor.calibration.data import REMEDY, load
from candor.calibration.errors import DataError
from candor.calibration.shapes import Reading

TEST = "tests.calibration.test_sources"


def kinds() -> Iterator[tuple[str, str]]:
    """Yields each kind of file and what is said of it."""
    test: Any = import_module(TEST)
    with TemporaryDirectory() as folder:
        for title, (name, content, _) in test.KINDS.items():
            path = Path(folder) / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
            yield title, _said(path)
            if path.is_file():
                path.unlink()
        for row in test.ROWS_OF_PROGRAMS:
            path = Path(folder) / "d.jsonl"
            path.write_bytes(test.jsonl(row))
            said = _said(path)
            if found := re.search(r"as (.+?) writes it", said):
                yield f"{found[1]}: {', '.join(row)}", said
    columns = {"label-studio.csv": "label=verdict, response=answer"}
    for path in sorted(test.EXPORTS.iterdir()):
        yield f"export {path.name}", _said(path, columns.get(path.name, ""))


def broken() -> Iterator[tuple[str, str]]:
    """Yields the beginning of each broken file and what is said of it."""
    with TemporaryDirectory() as folder:
        for name, content, _ in import_module(TEST).BROKEN:
            path = Path(folder) / name
            path.write_bytes(content)
            yield f"{name}: {content[:70]!r}", _said(path)


def _said(path: Path, columns: str = "") -> str:
    """Without the folder, the advice that every message of records ends with, and a library's own words."""
    try:
        text = load(path, Reading.parse(columns, "exact")).summary()
    except DataError as error:
        text = str(error).replace(REMEDY, "")
        text = re.sub(r"(cannot be (?:read|unpacked): ).*", r"\1...", text)
    return " / ".join(
        line.strip() for line in text.replace(f"{path.parent}/", "").splitlines() if line.strip()
    )


def tables() -> str:
    def table(title: str, rows: Iterator[tuple[str, str]]) -> list[str]:
        cells = [(" ".join(pair[0].split()), pair[1]) for pair in rows]
        shown = [tuple(cell.replace("|", "\\|") for cell in pair) for pair in cells]
        return [f"| {title} | what is said |", "|---|---|", *(f"| `{a}` | {b} |" for a, b in shown)]

    return "\n".join([*table("kind", kinds()), "", *table("broken file", broken())])


if __name__ == "__main__":
    print(tables())
