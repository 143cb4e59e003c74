"""Each alert fires when it should and only then, and says where to read on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., str]
TESTS = sorted((Path(__file__).resolve().parents[2] / "docker/prometheus/tests").glob("*.yml"))


def test_configuration_and_rules_parse(run: Run) -> None:
    assert "SUCCESS" in run("promtool", "check", "config", "docker/prometheus/prometheus.yml")


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_rules_against_series(run: Run, file: Path) -> None:
    run("promtool", "test", "rules", file)


def test_alertmanager_configuration_parses(run: Run) -> None:
    assert "SUCCESS" in run("amtool", "check-config", "docker/alertmanager/alertmanager.yml")


def test_every_alert_is_seen_to_fire_and_to_be_quiet(rules: list[dict[str, Any]]) -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for file in TESTS:
        for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else quiet).add(case["alertname"])
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert fires == quiet == alerts


def test_every_alert_has_its_section_in_the_runbook(
    rules: list[dict[str, Any]], runbook: dict[str, str]
) -> None:
    for rule in rules:
        if "alert" in rule:
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert (page, runbook.get(anchor)) == ("docs/runbook.md", rule["alert"])
            assert rule["labels"]["severity"] in ("warning", "critical")
