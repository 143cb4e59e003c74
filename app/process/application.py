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

from candor.app.answering.decisions import DecisionResolver
from candor.app.answering.escalation import Escalation, upstream_of
from candor.app.answering.preparing import Preparing
from candor.app.answering.waiting import EngineWatch
from candor.app.edge import errors
from candor.app.edge.connections import Connections, most_connections
from candor.app.edge.keys import KeyRing
from candor.app.edge.limits import Admission, RateLimit
from candor.app.edge.middleware import BodyLimit, Gate, HeadAsGet, Hosts, RequestId
from candor.app.edge.quotas import Quotas
from candor.app.edge.routes import (
    answers,
    decisions,
    feedback,
    operations,
    reliability,
    review,
    served,
    surface,
)
from candor.app.edge.routes.console import Console
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.services import LifespanState, Services
from candor.app.process.backend import Backend
from candor.app.process.ending import Leaving
from candor.app.process.processors import EngineProcessors
from candor.app.process.promoted import Located
from candor.app.process.renewal import Renewal
from candor.app.process.replicas import Replicas, SharedPromotions, promotions_of
from candor.app.process.selftest import SelfTest
from candor.app.process.settings import Settings
from candor.app.store.drawing import Drawing
from candor.app.store.store import Keeping, VerdictStore
from candor.app.telemetry.audit import AuditLog
from candor.app.telemetry.health import ServerMetrics
from candor.app.telemetry.metrics import Metrics
from candor.app.telemetry.tracing import Traced, exemplar

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
    AuditFileError or StoreError for a file that cannot be used.
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
    store = _store(settings)
    if store is not None:
        held = store
        health.watch_store(lambda: held.behind, lambda: held.lost)
    promotions = backend.promotions or promotions_of(settings)
    requests = RateLimit(settings.requests_per_minute, "requests")
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
        renewal = Renewal(settings, promotions, instruments, admission, watch, store, tracer, escalation)
        slots = {
            name: await renewal.begin(name, one, resolvers[name], selftests[name])
            for name, one in backends.items()
        }
        token_rate = RateLimit(settings.tokens_per_minute, "tokens")
        replicas: Replicas | None = None
        if isinstance(promotions, SharedPromotions):
            for slot in slots.values():
                bundle = slot.current.bundle
                if bundle.manifest.name not in promotions.over:
                    promotions.begin(
                        bundle.manifest.name, Located(str(slot.current.path.resolve()), bundle.digest)
                    )
            replicas = Replicas(promotions, renewal, slots.values(), (requests, token_rate), quotas)
            await replicas.beat()
        certificates = await renewal.watch_certificates(slots)
        slots = {first: slots[first]} | dict.fromkeys(aliases, slots[first]) | slots
        services = Services(
            engine=backend.engine,
            slots=slots,
            admission=admission,
            token_rate=token_rate,
            quotas=quotas,
            preparing=Preparing(_PREPARED_AT_ONCE, admission.alone),
            leaving=leaving,
            watch=watch,
            store=store,
            surface=await surface.start(backend, first),
            certificates=certificates,
            metrics=instruments,
            estimator=settings.estimator,
            request_timeout_s=settings.request_timeout_s,
            started=int(time.time()),
            renewal=renewal,
            replicas=replicas,
        )
        running = [asyncio.create_task(work) for work in (watch.run(), quotas.run(), health.run(watch))]
        if certificates is not None:
            running.append(asyncio.create_task(certificates.run()))
        if replicas is not None:
            running.append(asyncio.create_task(replicas.run()))
        try:
            yield {"services": services}
        finally:
            for task in running:
                task.cancel()
            if services.surface is not None:
                await services.surface.unattended.close()
            services.preparing.close()
            await asyncio.to_thread(quotas.write)
            await asyncio.to_thread(audit.close)
            if replicas is not None:
                await replicas.exchange()
                await replicas.close()
            await renewal.close()
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
    for module in (answers, decisions, surface, reliability, feedback, review, served, operations):
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
    app.add_middleware(Gate, keys=keys, rate=requests)
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


def _store(settings: Settings) -> VerdictStore | None:
    if settings.store is None:
        return None
    return VerdictStore(
        settings.store,
        settings.store_spool,
        drawing=Drawing(settings.audit_share, settings.audit_by),
        keeping=Keeping(
            settings.keep_texts, settings.keep_states, settings.keep_days, settings.store_verdicts
        ),
        most_spooled_bytes=settings.store_spool_bytes,
    )
