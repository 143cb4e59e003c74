"""The FastAPI application: its startup, its shutdown and its routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware

from candor.app.answering.decisions import DecisionResolver, DecisionService
from candor.app.answering.escalation import Escalation, upstream_of
from candor.app.answering.preparing import Preparing
from candor.app.answering.request import gates_of
from candor.app.answering.scoring import Scorer
from candor.app.answering.waiting import EngineWatch
from candor.app.edge import errors
from candor.app.edge.connections import Connections, most_connections
from candor.app.edge.keys import KeyRing
from candor.app.edge.limits import Admission, RateLimit
from candor.app.edge.middleware import BodyLimit, Gate, HeadAsGet, Hosts, RequestId
from candor.app.edge.quotas import Quotas
from candor.app.edge.routes import answers, decisions, feedback, operations, reliability, served, surface
from candor.app.edge.routes.console import Console
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.services import LifespanState, ServedModel, Services
from candor.app.feedback import FeedbackStore
from candor.app.process.backend import Backend
from candor.app.process.ending import Leaving
from candor.app.process.processors import EngineProcessors
from candor.app.process.selftest import SelfTest
from candor.app.process.settings import Settings
from candor.app.telemetry.audit import AuditLog
from candor.app.telemetry.health import ServerMetrics
from candor.app.telemetry.metrics import Metrics
from candor.app.telemetry.tracing import Traced, exemplar
from candor.policy.certificate import RuleKind

_PREPARED_AT_ONCE = 1 << 21
"""Characters that wait to be tokenised; a second or two of one processor's work."""


class _Documented(FastAPI):
    """Its OpenAPI document names no 422, which FastAPI assumes: a field that is wrong is a 400, as with OpenAI."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document


def create_app(
    settings: Settings,
    backend: Backend,
    on_engine_death: Callable[[], None] = lambda: None,
    tracer: Tracer | None = None,
    leaving: Leaving | None = None,
) -> FastAPI:
    """Returns the application that serves `backend` and owns it: it closes the engine when it ends.

    on_engine_death: called once; the caller should then end the application. tracer: None disables tracing.
    leaving: set by the caller before it ends the application. `app.state.connections` bounds connections: give its
    `protocol` to uvicorn.
    Raises Refused if the settings ask for an alpha that the bundle does not have or an upstream that cannot be asked,
    and KeyFileError, QuotaFileError,
    AuditFileError or FeedbackFileError for a file that cannot be used.
    """
    keys = KeyRing(settings.keys, settings.keys_grace_s) if settings.keys else None
    weights = keys.weights if keys else dict
    leaving = leaving or Leaving()
    registry = CollectorRegistry()
    health = ServerMetrics(registry)
    if keys:
        health.watch_keys(keys.stale_s)
    quotas = Quotas(settings.quotas)
    audit = AuditLog(settings.audit_log)
    first, *aliases = settings.model_names(backend.bundle.manifest.name)
    backends = {first: backend} | {one.bundle.manifest.name: one for one in backend.adapted}
    resolvers = {name: DecisionResolver(one, settings) for name, one in backends.items()}
    selftests = {name: SelfTest(one) for name, one in backends.items()}
    store = FeedbackStore(settings.feedback) if settings.feedback else None
    upstream = upstream_of(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[LifespanState]:
        watch = EngineWatch(
            backend.engine,
            settings.engine_check_interval_s,
            settings.engine_stall_timeout_s,
            on_engine_death,
            EngineProcessors(),
        )
        traces = {"exemplar": exemplar} if tracer else {}
        instruments = Metrics(registry, first, **traces)
        admission = Admission(settings.max_in_flight, settings.max_in_flight_tokens, weights)
        escalation = Escalation(settings, upstream, quotas, instruments) if upstream else None
        scorers: list[Scorer] = []
        models: dict[str, ServedModel] = {}
        for name, one in backends.items():
            bundle, metrics = one.bundle, instruments.of(name)
            gates = gates_of(bundle, settings)
            metrics.describe(bundle, settings.estimator, gates)
            scorer = Scorer(bundle, settings.estimator, settings.scoring_timeout_s, gates)
            scorers.append(scorer)
            await scorer.warm_up()
            policy = bundle.manifest.policy
            cascade = bundle.manifest.cascade if gates else None
            escalates = escalation.of(cascade, metrics) if escalation else None
            service = DecisionService(
                one.engine, policy, scorer, admission, metrics, watch, tracer, escalates
            )
            rule: RuleKind = "two-gates" if gates else "sdm"
            models[name] = ServedModel(name, bundle, rule, resolvers[name], service, selftests[name], metrics)
        models = {first: models[first]} | dict.fromkeys(aliases, models[first]) | models
        services = Services(
            engine=backend.engine,
            models=models,
            admission=admission,
            token_rate=RateLimit(settings.tokens_per_minute, "tokens"),
            quotas=quotas,
            preparing=Preparing(_PREPARED_AT_ONCE, admission.alone),
            leaving=leaving,
            watch=watch,
            feedback=store,
            surface=await surface.start(backend, first),
            metrics=instruments,
            estimator=settings.estimator,
            request_timeout_s=settings.request_timeout_s,
            started=int(time.time()),
        )
        running = [asyncio.create_task(work) for work in (watch.run(), quotas.run(), health.run(watch))]
        try:
            yield {"services": services}
        finally:
            for task in running:
                task.cancel()
            services.preparing.close()
            await asyncio.to_thread(quotas.write)
            await asyncio.to_thread(audit.close)
            for scorer in scorers:
                scorer.close()
            if store is not None:
                await store.close()
            if escalation is not None:
                await escalation.close()
            await backend.engine.close()

    app = _Documented(
        title="Candor", lifespan=lifespan, docs_url=None, redoc_url=None, root_path=settings.root_path or ""
    )
    # This makes the OpenAPI document say that keys are needed; app.edge.middleware.Gate checks them.
    keyed = [Depends(HTTPBearer(auto_error=False))] if keys else []
    turned_away: dict[int | str, dict[str, Any]] = (
        {status: ERRORS[status] for status in (401, 403)} if keys else {}
    )
    for module in (answers, decisions, surface, reliability, feedback, served, operations):
        app.include_router(module.router, dependencies=keyed, responses=turned_away)
    app.mount("/console", Console(), name="console")
    errors.install(app)
    app.state.connections = Connections(
        most_connections(settings.max_connections),
        settings.max_connections_per_address,
        health.refused_connection,
    )
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(Gate, keys=keys, rate=RateLimit(settings.requests_per_minute, "requests"))
    app.add_middleware(Hosts, allowed=settings.hosts)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # the SDKs send many of their own
            expose_headers=["x-request-id", "x-sdm-region", "x-sdm-abstained", "x-sdm-bundle", "retry-after"],
        )
    app.add_middleware(RequestId, leaving=leaving, audit=audit, log_bodies=settings.log_bodies)
    if tracer is not None:
        app.add_middleware(Traced, tracer=tracer)
    return app
