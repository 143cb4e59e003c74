"""docs/settings.md says what can be set: its table and its options are compared with the code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.main import get_command

from candor.app.cli import cli
from candor.app.process.settings import Settings
from candor.engine.vllm_options import CAPTURE_WRONG, CHANGES_H, OURS

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/settings.md").read_text(encoding="utf-8")


def table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `CANDOR_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def test_the_table_is_the_settings() -> None:
    assert table() in DOCUMENT, f"put this into docs/settings.md:\n{table()}"


def test_the_options_are_those_of_the_command() -> None:
    beginning = DOCUMENT.split("\n\n")[1]
    serve = get_command(cli).commands["serve"]  # type: ignore[attr-defined]
    assert set(re.findall(r"`(--[\w-]+)`", beginning)) == {one.opts[0] for one in serve.params}


@pytest.mark.parametrize(
    ("beginning", "names"),
    [
        ("Decided elsewhere", OURS),
        ("Part of the bundle's identity", CHANGES_H),
        ("Not served", CAPTURE_WRONG),
    ],
)
def test_the_lists_of_vllms_options_are_those_of_the_code(beginning: str, names: Iterable[str]) -> None:
    paragraph = DOCUMENT.split(f"**{beginning}**")[1]
    paragraph = re.split(r"\.\s", paragraph)[0]
    assert re.findall(r"`--([\w-]+)`", paragraph) == [name.replace("_", "-") for name in names]
