"""Spans: what is in them, whose child they are, and that there are none unless they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics

from candor.app.telemetry.tracing import tracer_from_environment

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(serve: Any, exporter: InMemorySpanExporter) -> Iterator[Any]:
    """A server that traces into `exporter`."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serve(tracer=provider.get_tracer("test")) as server:
        yield server
    provider.shutdown()


def ask(server: Any, prompt: str, headers: dict[str, str], **more: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "tiny", "messages": messages, **more}
    return server.client.post("/v1/chat/completions", json=body, headers=headers)


def spans(exporter: InMemorySpanExporter, wait_until: Any, count: int) -> dict[str, ReadableSpan]:
    """Finished ones by name, once there are so many: a response may come before its span has ended."""
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_the_spans_of_an_answer(traced: Any, exporter: InMemorySpanExporter, wait_until: Any) -> None:
    response = ask(traced, "ask", CALLER)
    found = spans(exporter, wait_until, 4)
    assert set(found) == {"POST /v1/chat/completions", "answer", "generate", "score"}
    request, answer = found["POST /v1/chat/completions"], found["answer"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert answer.parent.span_id == request.context.span_id
    assert found["generate"].parent.span_id == found["score"].parent.span_id == answer.context.span_id
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["candor.request_id"] == response.headers["x-request-id"]
    assert answer.attributes["gen_ai.usage.output_tokens"] == 3
    assert answer.start_time <= found["generate"].end_time <= found["score"].start_time <= answer.end_time


def test_the_evaluation_is_an_event_with_score_and_region(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    result = ask(traced, "ask", {}).json()["reliability"]["results"][0]
    [event] = spans(exporter, wait_until, 4)["score"].events
    assert event.name == "gen_ai.evaluation.result"
    assert dict(event.attributes) == {
        "gen_ai.evaluation.name": "sdm",
        "gen_ai.evaluation.score.value": result["probability"],
        "gen_ai.evaluation.score.label": "high",
        "gen_ai.evaluation.explanation": "It lies in the region calibrated for 90% accuracy.",
        "candor.reason": "none",
        "candor.alpha": 0.9,
    }


def test_an_answer_that_could_not_be_scored_has_no_score(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    traced.engine.script("ask", state="missing")
    ask(traced, "ask", {})
    [event] = spans(exporter, wait_until, 4)["score"].events
    assert event.attributes["gen_ai.evaluation.score.label"] == "unavailable"
    assert "gen_ai.evaluation.score.value" not in event.attributes


def test_waiting_in_the_engine_is_a_span_of_its_own(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    traced.engine.script("ask", queued_s=0.25)
    ask(traced, "ask", {})
    found = spans(exporter, wait_until, 5)
    assert found["queue"].end_time - found["queue"].start_time == 250_000_000
    assert found["queue"].end_time == found["generate"].start_time


def test_every_choice_and_every_stream_is_traced(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    ask(traced, "ask", {}, n=3, stream=True)
    spans(exporter, wait_until, 10)
    answers = [span for span in exporter.get_finished_spans() if span.name == "answer"]
    assert sorted(span.attributes["candor.choice"] for span in answers) == [0, 1, 2]
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 1


def test_spans_are_named_after_routes_and_not_after_what_clients_write(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    traced.client.get("/v1/models/some/model")
    traced.client.get("/v1/nothing/here")
    assert set(spans(exporter, wait_until, 2)) == {"GET /v1/models/{model:path}", "GET"}


def test_an_error_is_marked(traced: Any, exporter: InMemorySpanExporter, wait_until: Any) -> None:
    traced.engine.script("ask", fails=RuntimeError("no"))
    assert ask(traced, "ask", {}).status_code == 500
    request = spans(exporter, wait_until, 2)["POST /v1/chat/completions"]
    assert not request.status.is_ok
    assert request.attributes["http.response.status_code"] == 500


def test_probes_are_not_traced_and_no_text_is_kept(
    traced: Any, exporter: InMemorySpanExporter, wait_until: Any
) -> None:
    for path in ("/livez", "/metrics", "/console/"):
        traced.client.get(path)
    ask(traced, "a secret question", {})
    spans(exporter, wait_until, 4)
    assert len(exporter.get_finished_spans()) == 4
    everything = " ".join(span.to_json() for span in exporter.get_finished_spans())
    assert "secret" not in everything
    assert "answer." not in everything  # "The answer." is what it said


def test_metrics_carry_the_trace_as_exemplar(traced: Any) -> None:
    ask(traced, "ask", CALLER)
    page = traced.client.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    ).text
    samples = [sample for family in parse_open_metrics(page) for sample in family.samples if sample.exemplar]
    assert {sample.exemplar.labels["trace_id"] for sample in samples} == {TRACE}
    names = {sample.name for sample in samples}
    assert {"sdm_answers_total", "sdm_probability_bucket", "sdm_scoring_duration_seconds_bucket"} <= names


def test_a_caller_that_does_not_sample_leaves_no_exemplar(traced: Any) -> None:
    ask(traced, "ask", {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    page = traced.client.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    ).text
    assert "trace_id" not in page


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP receiver: its address, and the spans that came."""
    came: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                name = next(
                    a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
                )
                came.extend((self.path, name, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", came
        http.shutdown()
        thread.join()


def test_spans_are_sent_where_the_environment_says(
    receiver: tuple[str, list[Any]], serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, came = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with tracer_from_environment() as tracer, serve(tracer=tracer) as server:
        ask(server, "ask", CALLER)
    assert {(path, service) for path, service, _ in came} == {("/v1/traces", "candor")}
    assert {span.name for _, _, span in came} == {"POST /v1/chat/completions", "answer", "generate", "score"}
    assert {span.trace_id.hex() for _, _, span in came} == {TRACE}


def test_without_an_address_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with tracer_from_environment() as tracer:
        assert tracer is None


def test_a_clients_made_up_trace_is_no_exemplar_where_tracing_is_off(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK is there and switched off: its spans then carry the caller's id, sampled as the caller says."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = TracerProvider()
    with serve(tracer=provider.get_tracer("test")) as server:
        ask(server, "ask", CALLER)
        accept = {"accept": "application/openmetrics-text"}
        assert TRACE not in server.client.get("/metrics", headers=accept).text
