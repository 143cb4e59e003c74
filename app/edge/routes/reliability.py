"""`POST /v1/reliability`: the verdict on a response that the client already has."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request

from candor.app.answering.waiting import Deadline, seconds_for, unless_interrupted
from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.reliability import ReliabilityObject
from candor.app.edge.schemas.scoring import ScoreRequest, ScoreResponse
from candor.app.edge.services import InjectedServices
from candor.app.store.records import GivenVerdict
from candor.app.telemetry.audit import audited
from candor.app.writing.bodies import fingerprint, verdict_result

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/reliability", responses=ERRORS)
async def score_response(body: ScoreRequest, request: Request, services: InjectedServices) -> ScoreResponse:
    """The verdict on a given prompt and response, by the same estimator as for answers."""
    model = services.model(body.model, body.bundle)
    record = audited(request, model.name, model.bundle.digest)
    resolver, watch = model.resolver, services.watch
    bulk = resolver.measure(body)
    deadline = Deadline(seconds_for(request, services.request_timeout_s))
    preparation = services.prepare(request, bulk, lambda: resolver.pair(body))
    wanted = await unless_interrupted(preparation, request.receive, watch, deadline.left_s)
    judging = model.service.judge_pair(wanted)
    judged = await unless_interrupted(judging, request.receive, watch, deadline.left_s)
    given = GivenVerdict(
        f"rel-{uuid.uuid4().hex}",
        0,
        judged.verdict,
        model.bundle.digest,
        model.name,
        model.rule,
        wanted.caller,
        "pair",
    )
    record.verdicts.append((0, judged.verdict))
    if services.store is not None:
        services.store.note([given])
    return ScoreResponse(
        id=given.id,
        model=model.name,
        system_fingerprint=fingerprint(model.bundle.digest),
        reliability=ReliabilityObject(results=[verdict_result(0, judged)]),
    )
