"""The dashboards are what their code says, say what they show, and every expression finds data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

Run = Callable[..., str]

ANSWERS = {
    "model_name": "m",
    "alpha": "0.9",
    "region": "high",
    "decision": "answered",
    "reason": "none",
}
ABSTAINED = ANSWERS | {"region": "low", "decision": "abstained", "reason": "below_class_threshold"}
ENGINE = {"model_name": "m", "engine": "0"}


def test_committed_dashboards_are_what_the_code_writes(root: Path, tmp_path: Path) -> None:
    if find_spec("grafana_foundation_sdk") is None:
        pytest.skip("grafana-foundation-sdk is not installed")
    script = root / "docker/grafana/dashboards.py"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment)
    committed = {file.name: file.read_text() for file in script.with_suffix("").glob("*.json")}
    assert committed == {file.name: file.read_text() for file in tmp_path.iterdir()}


@pytest.mark.parametrize("board", ["candor", "runbook"])
def test_dashboard_is_valid_grafana(root: Path, board: str) -> None:
    """After Grafana's own schemas: the dashboard, and each panel's options, drawing style and queries."""
    schemas = os.environ.get("GRAFANA_SCHEMAS")
    if schemas is None:
        pytest.skip(
            "GRAFANA_SCHEMAS must name the folder `jsonschema` of github.com/grafana/grafana-foundation-sdk"
        )

    def faults(kind: str, definition: str, part: dict[str, Any]) -> list[str]:
        schema = json.loads((Path(schemas) / f"{kind}.jsonschema.json").read_text(encoding="utf-8"))
        validator = Draft7Validator(schema | {"$ref": f"#/definitions/{definition}"})
        return [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(part)]

    document = json.loads((root / f"docker/grafana/dashboards/{board}.json").read_text(encoding="utf-8"))
    assert faults("dashboard", "Dashboard", document) == []
    assert faults("dashboard", "Dashboard", document | {"refresh": 5}) != []
    for panel in document["panels"]:
        if panel["type"] == "row":
            continue
        assert faults(panel["type"], "Options", panel["options"]) == [], panel["title"]
        for query in panel.get("targets", ()):
            assert faults("prometheus", "Dataquery", query) == [], panel["title"]
        if style := panel.get("fieldConfig", {}).get("defaults", {}).get("custom"):
            assert faults(panel["type"], "FieldConfig", style) == [], panel["title"]


def test_every_panel_says_what_it_shows(
    root: Path, panels: list[dict[str, Any]], runbook: dict[str, str]
) -> None:
    sections = json.loads((root / "docker/grafana/dashboards/runbook.json").read_text(encoding="utf-8"))[
        "panels"
    ]
    titles = {section["id"]: section["title"] for section in sections}
    assert set(titles.values()) <= set(runbook.values())
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert panel["description"], panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"], panel["title"]
        (link,) = panel["links"]
        number = int(link["url"].removeprefix("/d/candor-runbook?viewPanel="))
        assert link["title"] == f"Runbook: {titles[number]}"
        for query in panel["targets"]:
            assert 'model_name=~"$model_name"' in query["expr"], panel["title"]


def test_every_expression_finds_data(
    run: Run, root: Path, panels: list[dict[str, Any]], tmp_path: Path
) -> None:
    expressions = {query["expr"] for panel in panels for query in panel["targets"]}
    cases = []
    for expression in sorted(expressions):
        filled = expression.replace("$model_name", ".+").replace("$__rate_interval", "1m")
        cases.append(
            {
                "expr": f"count(({filled}) > -1e9) > bool 0",  # NaN is not data
                "eval_time": "30m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        )
    file = tmp_path / "panels.yml"
    test = {"interval": "30s", "input_series": _series(), "promql_expr_test": cases}
    document = {
        "rule_files": [str(root / "docker/prometheus/rules.yml")],
        "evaluation_interval": "1m",
        "tests": [test],
    }
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    run("promtool", "test", "rules", file)


def _series() -> list[dict[str, str]]:
    """What a server with some traffic exposes."""
    model = {"model_name": "m"}
    certificate = model | {"rule": "two-gates", "alpha": "0.9"}
    evidence = [
        ("sdm_certificate_evidence", certificate | {"direction": way}) for way in ("alarm", "renewal")
    ]
    gauges = {
        "sdm_bundle_info": model | {"bundle": "b", "alpha": "0.9"},
        "sdm_reference_abstention_ratio": model | {"alpha": "0.9"},
        "sdm_support_size": model | {"label": "1"},
        "sdm_certificate_threshold": certificate,
        "sdm_certificate_audits": certificate | {"label": "right"},
        "sdm_certificate_standing": certificate | {"standing": "suspended"},
        "sdm_prompt_drift_evidence": model | {"key": ""},
        "sdm_prompt_drift_threshold": model,
        "sdm_escalation_circuit": model,
        "vllm:num_requests_running": ENGINE,
        "vllm:num_requests_waiting": ENGINE,
        "vllm:kv_cache_usage_perc": ENGINE,
    }
    counters = [
        ("sdm_answers_total", ANSWERS),
        ("sdm_answers_total", ABSTAINED),
        ("sdm_answers_total", ABSTAINED | {"region": "ood", "reason": "out_of_distribution"}),
        ("sdm_tokens_saved_total", model),
        ("sdm_scoring_failures_total", model | {"cause": "timeout"}),
        ("sdm_escalations_total", model | {"outcome": "answered"}),
        ("sdm_escalation_tokens_total", model | {"kind": "prompt"}),
        ("sdm_feedback_total", model | {"region": "high", "decision": "answered", "correct": "true"}),
        ("vllm:prompt_tokens_total", ENGINE),
        ("vllm:generation_tokens_total", ENGINE),
        ("vllm:prefix_cache_hits_total", ENGINE),
        ("vllm:prefix_cache_queries_total", ENGINE),
        ("vllm:num_preemptions_total", ENGINE),
        ("vllm:request_success_total", ENGINE | {"finished_reason": "stop"}),
    ]
    histograms = [
        *(
            f"sdm_{name}"
            for name in ("probability", "distance_quantile", "rescaled_similarity", "prompt_p_value")
        ),
        "sdm_scoring_duration_seconds",
        "sdm_escalation_duration_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
    ]
    buckets = [(f"{name}_bucket", model | {"le": le}) for name in histograms for le in ("0.5", "+Inf")]
    return [
        *(_one(name, labels, "0.5x60") for name, labels in (*gauges.items(), *evidence)),
        *(_one(name, labels, "0+3x60") for name, labels in (*counters, *buckets)),
    ]


def _one(name: str, labels: dict[str, str], values: str) -> dict[str, str]:
    selector = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{selector}}}", "values": values}
