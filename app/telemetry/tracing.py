"""Tracing of requests across services: OpenTelemetry spans, sent by OTLP over HTTP.

    POST /v1/chat/completions        the request, child of the caller's span (W3C traceparent)
    └── answer                       one for each attempt at each choice
        ├── queue                    until the engine started on it, if the engine reports that
        ├── generate
        └── score                    with the event gen_ai.evaluation.result: the probability, labelled by region

Tracing is off unless OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) gives the destination. OpenTelemetry's
other variables (headers, service name, sampling) apply as usual. Spans contain no prompt and no answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import time_ns

from opentelemetry.trace import (
    SpanKind,
    StatusCode,
    Tracer,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candor.engine.base import Generation
from candor.policy.decision import Verdict
from candor.policy.words import explanation

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACED = "/v1/"
"""Only these paths are traced: probes and scrapes would bury the clients' requests."""


@contextmanager
def tracer_from_environment() -> Iterator[Tracer | None]:
    """Yields the tracer that the environment configures, or None; at the end, it sends the remaining spans."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        yield None
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "candor"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield provider.get_tracer("candor")
    finally:
        provider.shutdown()


def exemplar() -> dict[str, str] | None:
    """Returns the current request's trace id for a metric's sample, or None if this server records no such trace.

    Where tracing is switched off (OTEL_SDK_DISABLED), the current span is the client's own, with an id it made up.
    """
    span = get_current_span()
    context = span.get_span_context()
    recorded = span.is_recording() and context.trace_flags.sampled
    return {"trace_id": format_trace_id(context.trace_id)} if recorded else None


class Traced:
    """Puts every request under `/v1/` into a span, a child of the caller's."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not get_route_path(scope).startswith(_TRACED):
            await self._app(scope, receive, send)
            return
        above = TraceContextTextMapPropagator().extract(Headers(scope=scope))
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracer.start_as_current_span(scope["method"], above, SpanKind.SERVER, attributes) as span:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set_attribute("http.response.status_code", status)
                    span.set_attribute("candor.request_id", Headers(raw=message["headers"])["x-request-id"])
                    if status >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, send_and_note)
            finally:
                if route := scope.get("route"):  # the pattern: clients can make up any number of paths
                    span.update_name(f"{scope['method']} {route.path}")


class AnswerTrace:
    """The span of one attempt at a choice. It starts when this is made; each step is recorded once it ends."""

    def __init__(self, tracer: Tracer, index: int) -> None:
        self._tracer = tracer
        self._since = time_ns()
        self._span = tracer.start_span("answer", attributes={"candor.choice": index}, start_time=self._since)
        self._here = set_span_in_context(self._span)

    def generated(self, generation: Generation) -> None:
        if generation.queued_s is not None:
            self._step("queue", self._since + int(generation.queued_s * 1e9))
        self._step("generate", time_ns())
        self._span.set_attribute("gen_ai.usage.input_tokens", generation.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", generation.completion_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", [generation.finish_reason])

    def judged(self, verdict: Verdict) -> None:
        result: dict[str, str | float] = {
            "gen_ai.evaluation.name": "sdm",
            "gen_ai.evaluation.score.label": verdict.region,
            "gen_ai.evaluation.explanation": explanation(verdict),
            "candor.reason": verdict.reason or "none",
            "candor.alpha": verdict.alpha,
        }
        if verdict.probability is not None:
            result["gen_ai.evaluation.score.value"] = verdict.probability
        span = self._tracer.start_span("score", self._here, start_time=self._since)
        span.add_event("gen_ai.evaluation.result", result)
        span.end()

    def close(self) -> None:
        self._span.end()

    def _step(self, name: str, until: int) -> None:
        self._tracer.start_span(name, self._here, start_time=self._since).end(until)
        self._since = until
