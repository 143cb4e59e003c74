"""Routes for operators: what is served, how it does, and the metrics."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, get_args

import httpx
import pytest
from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from candor.app.answering.scoring import Cause
from candor.app.edge.connections import Connections
from candor.app.telemetry.metrics import REGION_OF
from candor.policy.decision import Reason

DIGEST = "0123456789abcdef" * 4


def families(response: httpx.Response) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def samples(server: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values by name and labels; all of them are of this model."""
    found = {}
    for name, family in families(server.client.get("/metrics")).items():
        if name.startswith("sdm_"):
            for sample in family.samples:
                assert sample.labels.pop("model_name") == "tiny"
                found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def test_models(server: Any) -> None:
    [model] = server.client.get("/v1/models").json()["data"]
    assert model["created"] > 1_700_000_000
    assert model | {"created": 0} == {
        "id": "tiny",
        "object": "model",
        "created": 0,
        "owned_by": "candor",
        "max_model_len": 512,
        "reliability": {
            "bundle": DIGEST,
            "alphas": [0.9, 0.95],
            "default_alpha": 0.9,
            "rule": "sdm",
            "estimator": "lower",
            "class_names": ["does not follow", "follows"],
        },
    }


def test_served_name(serve: Any) -> None:
    with serve(served_model_name="org/other") as server:
        assert server.client.get("/v1/models").json()["data"][0]["id"] == "org/other"
        assert server.client.get("/v1/models/org/other").json()["id"] == "org/other"
        assert server.chat("ask").status_code == 404


def test_several_served_names(serve: Any) -> None:
    with serve(served_model_name="first,org/second") as server:
        assert [one["id"] for one in server.client.get("/v1/models").json()["data"]] == [
            "first",
            "org/second",
        ]
        assert server.client.get("/v1/models/org/second").json()["id"] == "org/second"
        for name in ("first", "org/second"):
            assert server.chat("ask", model=name).json()["model"] == "first"
        assert server.chat("ask").status_code == 404


def test_the_names_other_servers_give_health_checks(server: Any) -> None:
    for path in ("/ping", "/v1/health/live", "/v1/health/ready"):
        assert server.client.get(path).json() == {"status": "ok"}
        assert server.client.head(path).status_code == 200


def test_one_route_for_conversations_and_prompts(server: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "ask"}], "reliability": {"mode": "abstain"}}
    answered = server.client.post("/invocations", json=chat)
    assert answered.json()["object"] == "chat.completion"
    assert answered.json()["choices"] == server.chat("ask").json()["choices"]
    assert answered.headers["x-sdm-region"] == "high"
    assert "[DONE]" in server.client.post("/invocations", json=chat | {"stream": True}).text
    assert server.client.post("/invocations", json={"prompt": "ask"}).json()["object"] == "text_completion"
    refused = server.client.post("/invocations", json=chat | {"model": "other"})
    assert refused.status_code == 404
    refused = server.client.post("/invocations", json=chat | {"reliabilty": {}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reliabilty")


def test_behind_a_proxy_under_a_path(serve: Any) -> None:
    with serve(root_path="/candor") as server:
        for path in ("/livez", "/candor/livez"):
            assert server.client.get(path).json() == {"status": "ok"}
        assert server.client.get("/candor/openapi.json").json()["servers"] == [{"url": "/candor"}]
        assert "Candor" in server.client.get("/candor/console/").text
        page = server.client.get("/candor/docs", follow_redirects=True)
        assert (page.url.path, page.status_code) == ("/candor/console/docs.html", 200)
        assert server.client.get("/candor/candor/livez").status_code == 404


def test_version(server: Any) -> None:
    assert server.client.get("/version").json() == {"version": version("candor"), "bundle": DIGEST}


def test_answers_are_counted_by_verdict(serve: Any) -> None:
    with serve() as server:
        for state in ("far", "edge", "missing", "wrong_size"):
            server.engine.script(state, state=state)
        server.chat("ask", n=2)
        for prompt in ("far", "edge", "missing", "wrong_size"):
            server.chat(prompt, reliability={"mode": "abstain"}, stream=True)
        server.chat("ask", reliability={"mode": "off"})
        server.client.post("/v1/reliability", json={"prompt": "ask", "response": "x"})
        found = samples(server)
    answers = {
        (labels["region"], labels["decision"], labels["reason"]): value
        for (name, pairs), value in found.items()
        if name == "sdm_answers_total" and value
        for labels in [dict(pairs)]
        if labels["alpha"] == "0.9"
    }
    assert answers == {
        ("high", "answered", "none"): 2,
        ("ood", "abstained", "out_of_distribution"): 1,
        ("low", "abstained", "below_similarity_threshold"): 1,
        ("unavailable", "abstained", "scoring_unavailable"): 2,
    }
    assert found["sdm_scoring_failures_total", frozenset({("cause", "not_captured")})] == 1
    assert found["sdm_scoring_failures_total", frozenset({("cause", "non_finite")})] == 1
    for name in ("sdm_probability", "sdm_distance_quantile", "sdm_rescaled_similarity"):
        assert found[f"{name}_count", frozenset()] == 4
    # With the given pair, whose verdict is not an answer.
    assert found["sdm_scoring_duration_seconds_count", frozenset()] == 5


def test_what_is_in_use(server: Any) -> None:
    found = samples(server)
    for alpha, ratio in (("0.9", 0.25), ("0.95", 0.5)):
        assert found["sdm_bundle_info", frozenset({("bundle", DIGEST), ("alpha", alpha)})] == 1
        assert found["sdm_reference_abstention_ratio", frozenset({("alpha", alpha)})] == ratio
    for label in ("0", "1"):
        assert found["sdm_support_size", frozenset({("label", label)})] == 400


def test_everything_begins_at_zero(serve: Any) -> None:
    """A rate needs a value before the first event, so each reason to abstain has its series, at each alpha."""
    assert set(REGION_OF) == set(get_args(Reason))
    with serve() as server:
        found = samples(server)
    counters = {key: value for key, value in found.items() if key[0].endswith(("_total", "_count"))}
    assert set(counters.values()) == {0}
    answers = [dict(labels) for name, labels in counters if name == "sdm_answers_total"]
    assert len(answers) == 2 * (1 + len(REGION_OF))
    for alpha in ("0.9", "0.95"):
        seen = {one["reason"]: one["region"] for one in answers if one["alpha"] == alpha}
        assert seen == {"none": "high", **REGION_OF}
    causes = {dict(labels)["cause"] for name, labels in counters if name == "sdm_scoring_failures_total"}
    assert causes == set(get_args(Cause))


def test_the_share_out_of_distribution_that_calibration_measured(serve: Any) -> None:
    report = {"held_out": {"ood": {"hits": 3, "of": 60, "value": 0.05}}}
    with serve(report=report) as server:
        assert samples(server)["sdm_reference_ood_ratio", frozenset()] == 0.05


def test_the_reference_is_the_lower_estimators(serve: Any) -> None:
    with serve(estimator="plain") as server:
        assert not [name for name, _ in samples(server) if name == "sdm_reference_abstention_ratio"]


@pytest.fixture
def engine_counter() -> Any:
    counter = Counter("vllm:test_requests", "As vLLM registers it.", ["model_name"])
    yield counter
    REGISTRY.unregister(counter)


def test_the_engines_own_metrics_pass_through(server: Any, engine_counter: Counter) -> None:
    engine_counter.labels("tiny").inc(7)
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vllm:test_requests_total{model_name="tiny"} 7.0' in response.text
    assert "sdm_bundle_info" in response.text


# What Prometheus 2 and 3 send; the second takes names as they are.
@pytest.mark.parametrize("escaping", ["", "; escaping=allow-utf-8"])
def test_open_metrics(server: Any, engine_counter: Counter, escaping: str) -> None:
    engine_counter.labels("tiny").inc(7)
    server.chat("ask")
    accept = {"accept": f"application/openmetrics-text; version=1.0.0{escaping}"}
    response = server.client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert 'vllm:test_requests_total{model_name="tiny"} 7.0' in response.text
    names = [family.name for family in parse_open_metrics(response.text)]
    assert len(names) == len(set(names))
    assert {"sdm_answers", "vllm:test_requests"} <= set(names)


def test_two_servers_do_not_share_their_counts(serve: Any) -> None:
    with serve() as first:
        first.chat("ask")
        assert samples(first)["sdm_probability_count", frozenset()] == 1
    with serve() as second:
        assert samples(second)["sdm_probability_count", frozenset()] == 0


def test_the_interface_describes_itself(server: Any) -> None:
    document = server.client.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "ChatCompletionRequest"
    )
    refused = {"400", "401", "403", "404", "408", "409", "413", "429"}
    assert set(chat["responses"]) == {"200", *refused, "500", "503"}
    for path in ("/v1/reliability", "/v1/reliability/calibration"):  # of a model that may be unknown
        assert "404" in document["paths"][path]["get"]["responses"]
    unprocessable = chat["responses"]["400"]["content"]["application/json"]["schema"]
    assert unprocessable == {"$ref": "#/components/schemas/ErrorBody"}
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["tools"]["enum"] == [None, []]
    assert server.client.get("/redoc").status_code == 404  # it would load from another host


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain; version=abc",
        "text/plain; version=",
        "text/plain;version=1.0.0;escaping=x",
        "application/openmetrics-text; version=abc",
        "application/openmetrics-text; version=9.9",
        "*/*",
        "",
        "a" * 4000,
    ],
)
def test_metrics_whatever_a_scraper_accepts(server: Any, accept: str) -> None:
    response = server.client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert "sdm_bundle_info" in response.text


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics", "/v1/models", "/console/"])
def test_head_is_get_without_a_body(server: Any, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert server.client.head("/nowhere").status_code == 404
    assert server.client.get("/livez").json() == {"status": "ok"}  # the connection is in order


def test_what_the_server_itself_measures(server: Any) -> None:
    found = families(server.client.get("/metrics"))
    causes = {
        sample.labels["cause"]
        for sample in found["candor_connections_refused"].samples
        if "cause" in sample.labels
    }
    assert causes == set(Connections.CAUSES)
    assert found["candor_engine_starved"].samples[0].value == 0
    assert found["candor_keys_stale_seconds"].samples[0].value == 0
    assert found["candor_event_loop_lag_seconds"].samples[0].value >= 0
