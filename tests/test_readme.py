"""README's tables and commands are tested facts."""

from __future__ import annotations

import re
from pathlib import Path

from candor.app.process.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `CANDOR_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def test_the_settings_table_is_the_settings() -> None:
    assert settings_table() in README, f"put this into README.md:\n{settings_table()}"


def test_every_top_level_folder_has_its_line() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+)/` \|", README, re.MULTILINE))
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"docker", "docs", "tests"}
    assert listed == there


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
