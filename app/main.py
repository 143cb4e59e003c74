"""The application: what is made at start, what is ended at the end, and which routes there are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from app import errors
from app.admission import Admission
from app.backend import Backend
from app.desk import OrderDesk
from app.metrics import Metrics
from app.middleware import BodyLimit, RequestId
from app.routes import chat, completions, operations, reliability
from app.scoring import Scorer
from app.service import AnswerService
from app.settings import Settings
from app.state import LifespanState, Services
from app.watch import EngineWatch


def create_app(
    settings: Settings, backend: Backend, on_engine_death: Callable[[], None] = lambda: None
) -> FastAPI:
    """Serves `backend`, which it owns from then on: the engine is closed when the application ends.

    on_engine_death: called once; what runs the application should end it.
    Raises Refused where the settings ask for an alpha that the bundle does not have.
    """
    bundle = backend.bundle
    desk = OrderDesk(backend, settings, settings.served_model_name or bundle.manifest.name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[LifespanState]:
        watch = EngineWatch(backend.engine, settings.engine_check_interval_s, on_engine_death)
        metrics = Metrics(CollectorRegistry(), desk.model_name)
        metrics.describe(bundle, settings.estimator)
        scorer = Scorer(bundle.estimator, bundle.manifest.representation, settings.scoring_timeout_s)
        admission = Admission(settings.max_in_flight)
        service = AnswerService(backend.engine, bundle, scorer, admission, metrics, settings.estimator)
        services = Services(
            engine=backend.engine,
            bundle=bundle,
            desk=desk,
            service=service,
            admission=admission,
            watch=watch,
            metrics=metrics,
            estimator=settings.estimator,
            started=int(time.time()),
        )
        watching = asyncio.create_task(watch.run())
        try:
            yield {"services": services}
        finally:
            watching.cancel()
            scorer.close()
            await backend.engine.close()

    app = FastAPI(title="Candor", lifespan=lifespan, docs_url=None, redoc_url=None)
    for module in (chat, completions, reliability, operations):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(RequestId)
    return app
