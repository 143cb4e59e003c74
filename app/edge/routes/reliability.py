"""`POST /v1/reliability`: the verdict on a response that the client already has."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request

from candor.app.answering.waiting import seconds_for, unless_interrupted
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.reliability import ReliabilityObject
from candor.app.edge.schemas.scoring import ScoreRequest, ScoreResponse
from candor.app.edge.services import InjectedServices
from candor.app.feedback import GivenVerdict
from candor.app.writing.bodies import fingerprint, verdict_result

router = APIRouter()


@router.post("/v1/reliability", responses=ERRORS)
async def score_response(body: ScoreRequest, request: Request, services: InjectedServices) -> ScoreResponse:
    """The verdict on a given prompt and response, by the same estimator as for answers."""
    model = services.model(body.model)
    wanted = model.resolver.pair(body)
    within_s = seconds_for(request, services.request_timeout_s)
    services.admission.check(1, wanted.tokens)
    services.token_rate.take(request.state.caller, wanted.tokens)
    judged = await unless_interrupted(
        model.service.judge_pair(wanted), request.receive, services.watch, within_s
    )
    given = GivenVerdict(f"rel-{uuid.uuid4().hex}", 0, judged.verdict, model.bundle.digest)
    if services.feedback is not None:
        services.feedback.note([given])
    return ScoreResponse(
        id=given.id,
        model=model.name,
        system_fingerprint=fingerprint(model.bundle.digest),
        reliability=ReliabilityObject(results=[verdict_result(0, judged)]),
    )
