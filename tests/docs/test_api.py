"""docs/api.md's tables and example are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from candor.app.edge.schemas.reliability import ReliabilityOptions, ReliabilityResult
from candor.calibration.intervals import lower_bound
from candor.policy.certificate import Certificate
from candor.policy.decision import REGION_OF

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of its tables, each as the names in backticks that it holds."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [[" ".join(re.findall(r"`(\w+)`", cell)) for cell in row] for row in cells]


def test_every_option_of_a_request() -> None:
    shown = re.findall(r'^  "(\w+)":', section("Request"), re.MULTILINE)
    explained = re.findall(r"^- `(\w+)`:", section("Request"), re.MULTILINE)
    assert shown == list(ReliabilityOptions.model_fields)
    assert sorted(explained) == sorted(shown)


def test_every_field_of_a_result() -> None:
    fields, _ = section("Response").split("The first reason that holds is given:")
    assert [name for row in rows(fields) for name in row[0].split()] == list(ReliabilityResult.model_fields)


def test_every_reason_with_its_region_in_order() -> None:
    _, reasons = section("Response").split("The first reason that holds is given:")
    assert [(row[0], row[1]) for row in rows(reasons)] == list(REGION_OF.items())


def test_the_certificate_shown_is_one() -> None:
    match = re.search(r"```json\n(.*?)```", section("Certificates"), re.DOTALL)
    assert match
    shown = Certificate(**json.loads(match[1]))
    bound = lower_bound(shown.right, shown.answered, 1 - shown.confidence)
    assert shown.lower_bound == pytest.approx(bound, abs=5e-5)
