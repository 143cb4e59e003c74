"""Dashboards, rules and alerts speak only of metrics that exist, with labels that these have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from candor.app.telemetry.metrics import Metrics

ADDED_BY_PROMETHEUS = {"job", "instance", "le"}

_NAME = re.compile(r"(?<![\w:])([a-z_]+:?\w*[:\w]*)(?:\{([^}]*)\})?")


@pytest.fixture(scope="module")
def expressions(rules: list[dict[str, Any]], panels: list[dict[str, Any]]) -> list[str]:
    return [rule["expr"] for rule in rules] + [
        query["expr"] for panel in panels for query in panel["targets"]
    ]


@pytest.fixture(scope="module")
def registered() -> dict[str, set[str]]:
    """Name of every sample that the server can expose: its labels."""
    registry = CollectorRegistry()
    Metrics(registry, "m")
    collectors: dict[str, Any] = (
        registry._names_to_collectors
    )  # there is no public way before the first sample
    return {name: set(collector._labelnames) for name, collector in collectors.items()}


def _selectors(expressions: list[str], prefix: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics with that prefix and the labels that select them."""
    for expression in expressions:
        for name, labels in _NAME.findall(expression):
            if name.startswith(prefix):
                yield name, set(re.findall(r"(\w+)\s*(?:=|!)", labels))


def test_sdm_metrics_are_registered_with_these_labels(
    expressions: list[str], registered: dict[str, set[str]]
) -> None:
    used = list(_selectors(expressions, "sdm_"))
    assert len(used) > 30
    for name, labels in used:
        assert name in registered, f"{name} is used in docker/ and not registered by app/metrics.py"
        assert labels <= registered[name] | ADDED_BY_PROMETHEUS, (
            f"{name} has no label {labels - registered[name]}"
        )


def test_every_registered_metric_is_used(expressions: list[str], registered: dict[str, set[str]]) -> None:
    used = {name for name, _ in _selectors(expressions, "sdm_")}
    families = {re.sub("_(total|created|bucket|sum|count)$", "", name) for name in registered}
    missing = {family for family in families if not any(name.startswith(family) for name in used)}
    assert not missing, f"no panel and no rule uses {missing}"


def test_recorded_names_are_recorded(expressions: list[str], rules: list[dict[str, Any]]) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    used = {name for name, _ in _selectors(expressions, "model")}
    assert used == recorded | {"model_name"}


def test_vllm_metrics_are_in_its_source(expressions: list[str]) -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed (extra cpu or cuda)")
    source = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    declared = set(re.findall(r'name="(vllm:\w+)"', source))
    used = {name for name, _ in _selectors(expressions, "vllm:")}
    assert len(used) > 10
    for name in used:
        assert {name, re.sub("_(total|bucket|sum|count)$", "", name)} & declared, f"vLLM has no {name}"
