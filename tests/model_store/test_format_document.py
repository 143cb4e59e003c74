"""docs/bundle-format.md says what the program does: its tables and its example are compared with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from candor.model_store import errors
from candor.model_store.bundle import Exemplar
from candor.model_store.layout import layout
from candor.model_store.manifest import LIMITS, NAMES, Manifest
from candor.policy.cascade import CascadeCertificate, CascadeTerms
from candor.policy.certificate import Certificate, RuleCertificate, RuleTerms

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text("utf-8")


def _section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _rows(section: str) -> list[list[str]]:
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@pytest.fixture
def example() -> dict[str, Any]:
    match = re.search(r"```json\n(.*?)```", _section("manifest.json"), re.DOTALL)
    assert match is not None
    parsed: dict[str, Any] = json.loads(match[1])
    return parsed


def test_the_example_is_a_manifest(example: dict[str, Any]) -> None:
    manifest = Manifest.from_bytes(json.dumps(example).encode())
    assert json.loads(manifest.to_bytes()) == example
    assert list(json.loads(manifest.to_bytes())) == list(example)


def test_every_field_of_the_manifest_is_described(example: dict[str, Any]) -> None:
    described = {row[0].strip("`") for row in _rows(_section("manifest.json"))}
    example["adapter"] = {"name": "", "sha256": ""}
    expected = set()
    for key, value in example.items():
        if key == "files":
            expected |= {"files", "files.*.sha256", "files.*.size"}
        elif key == "certificates":
            expected |= {"certificates"} | {f"certificates[].{field.name}" for field in fields(Certificate)}
        elif key == "rule":
            expected |= {"rule"} | {f"rule.{field.name}" for field in fields(RuleTerms)}
            expected |= {f"rule.certificates[].{field.name}" for field in fields(RuleCertificate)}
        elif key == "cascade":
            expected |= {"cascade"} | {f"cascade.{field.name}" for field in fields(CascadeTerms)}
            expected |= {f"cascade.certificates[].{field.name}" for field in fields(CascadeCertificate)}
        elif key == "policy":
            expected |= {f"policy.{inner}" for inner in value}
            expected |= {f"policy.conversations.{inner}" for inner in value["conversations"]}
        elif isinstance(value, dict) and key != "provenance":
            expected |= {f"{key}.{inner}" for inner in value} | ({"adapter"} if key == "adapter" else set())
        else:
            expected.add(key)
    assert described == expected


def test_every_tensor_is_described() -> None:
    described = {row[0].strip("`"): (row[1], row[2]) for row in _rows(_section("estimator.safetensors"))}
    assert described == {
        name: (str(spec.dtype).removeprefix("torch."), f"({', '.join(spec.shape)})")
        for name, spec in layout(2, rule=True, probe=True, forecast=True).items()
    }


def test_the_fields_of_an_exemplar() -> None:
    described = [row[0].strip("`") for row in _rows(_section("exemplars.jsonl"))]
    assert described == [field.name for field in fields(Exemplar)]


def test_files_limits_and_errors() -> None:
    tree = re.findall(r"── (\S+)", DOCUMENT.split("```")[1])
    assert set(tree) == NAMES
    units = {"MiB": 2**20, "GiB": 2**30}
    for name, limit in LIMITS.items():
        match = re.search(r"[Aa]t most (\d+) (MiB|GiB)", _section(name))
        assert match is not None
        assert int(match[1]) * units[match[2]] == limit
    described = {row[0].strip("`") for row in _rows(_section("Reading"))}
    assert described == {one.__name__ for one in errors.BundleError.__subclasses__()}
