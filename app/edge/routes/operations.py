"""Routes that list the models, report health, load and version, give the metrics, and change the bundle in use."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from candor.app.answering.waiting import seconds_for, unless_interrupted
from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.bundle import shown_shadow
from candor.app.edge.schemas.renewal import (
    BundleInUse,
    BundlesInUse,
    PromoteRequest,
    RollbackRequest,
)
from candor.app.edge.schemas.responses import Model, ModelList, ServedBundle
from candor.app.edge.services import BundleBehind, InjectedServices, ServedModel, Services, Slot
from candor.app.process.ending import ShuttingDown
from candor.engine.base import EngineDead

router = APIRouter(route_class=BoundedRoute)

_CHANGES: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 404, 409, 503)}
_UNREADY: dict[int | str, dict[str, Any]] = {503: ERRORS[503]}
_DEEP: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401, 403, 500)}


@router.get("/v1/models")
async def list_models(services: InjectedServices) -> ModelList:
    """The models served, each with its bundle and the alphas it was calibrated at."""
    return ModelList(data=[_model(name, model, services) for name, model in services.models.items()])


@router.get("/v1/models/{model:path}", responses={404: ERRORS[404]})
async def retrieve_model(model: str, services: InjectedServices) -> Model:
    return _model(model, services.model(model), services)


@router.get("/livez")
@router.get("/v1/health/live")
async def live() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/readyz", responses=_UNREADY | _DEEP)
@router.get("/v1/health/ready", responses=_UNREADY | _DEEP)
async def ready(request: Request, services: InjectedServices, deep: bool = False) -> dict[str, str]:
    """The engine lives and gave the calibrated states when it was last asked, and the bundle is the one by which all
    replicas answer: send requests. `store: away`: answers go on, verdicts and labels wait for the database. deep: the
    engine is asked now, its golden prompts, for which a key needs the scope `operate`.
    """
    if deep:
        within_s = seconds_for(request, services.request_timeout_s)
        for model in services.models.values():
            await unless_interrupted(model.selftest.check(), request.receive, services.watch, within_s)
    if services.leaving.begun:
        raise ShuttingDown("this server is about to end; send requests to another")
    for model in services.models.values():
        if model.selftest.fault is not None:
            raise model.selftest.fault
    for slot in services.slots.values():
        if slot.behind is not None:
            raise BundleBehind(slot.behind)
    return _alive(services) | _waiting(services)


@router.get("/health", responses=_UNREADY)
@router.get("/ping", responses=_UNREADY)
async def healthy(services: InjectedServices) -> dict[str, str]:
    """The engine is asked now."""
    await services.watch.check()
    return _alive(services)


@router.get("/version")
async def show_version(services: InjectedServices) -> dict[str, str]:
    return {"version": version("candor"), "bundle": services.slot().current.bundle.digest}


@router.get("/docs", include_in_schema=False)
async def show_documentation() -> Response:
    """A page of `/openapi.json`; the address is relative, so that it holds behind a proxy."""
    return RedirectResponse("console/docs.html")


@router.get("/load")
async def show_load(services: InjectedServices) -> dict[str, int]:
    """Answers being written or waiting to be, under the name that vLLM gives it."""
    return {"server_load": services.admission.in_flight}


@router.get("/metrics", response_class=Response)
async def show_metrics(request: Request, services: InjectedServices) -> Response:
    """For Prometheus: this server's metrics and the engine's own."""
    content, content_type = services.metrics.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type})


@router.get("/bundles")
async def show_bundles(services: InjectedServices) -> BundlesInUse:
    """The bundle that answers under each name, what a rollback goes back to, and what shadows."""
    return BundlesInUse(data=[_in_use(slot) for slot in services.slots.values()])


@router.post("/bundles/promote", responses=_CHANGES)
async def promote_bundle(body: PromoteRequest, services: InjectedServices) -> BundleInUse:
    """Has another bundle answer, once its model, certificates and golden prompts are found to be right. No request
    fails or waits for it. It is kept: a restarted server answers by it too.
    """
    slot = services.slot(body.model)
    await services.renewal.promote(slot, body.bundle)
    return _in_use(slot)


@router.post("/bundles/rollback", responses=_CHANGES)
async def roll_back_bundle(body: RollbackRequest, services: InjectedServices) -> BundleInUse:
    """Has the bundle answer that did before the last promotion, at once."""
    slot = services.slot(body.model)
    await services.renewal.roll_back(slot)
    return _in_use(slot)


def _in_use(slot: Slot) -> BundleInUse:
    current, previous = slot.current, slot.previous
    return BundleInUse(
        model=current.name,
        bundle=current.bundle.digest,
        previous=previous and previous.bundle.digest,
        shadow=shown_shadow(current.shadow),
    )


def _alive(services: Services) -> dict[str, str]:
    if not services.watch.alive:
        raise EngineDead(str(services.watch.death.result()))
    return {"status": "ok"}


def _waiting(services: Services) -> dict[str, str]:
    away = services.replicas is not None and services.replicas.away
    behind = services.store is not None and services.store.behind
    return {"store": "away"} if away or behind else {}


def _model(name: str, model: ServedModel, services: Services) -> Model:
    return Model(
        id=name,
        created=services.started,
        max_model_len=services.engine.max_model_len,
        reliability=ServedBundle(
            bundle=model.bundle.digest,
            alphas=list(model.resolver.alphas),
            default_alpha=model.resolver.default_alpha,
            rule=model.rule,
            estimator=services.estimator,
            class_names=list(model.bundle.manifest.class_names),
        ),
    )
