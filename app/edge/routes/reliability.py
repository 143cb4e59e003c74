"""`POST /v1/reliability`: what is known of a response that somebody already has."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request

from candor.app.answering.interruption import seconds_for, unless_interrupted
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.scoring import Score, ScoreRequest
from candor.app.edge.services import Given
from candor.app.feedback import GivenVerdict
from candor.app.writing.bodies import fingerprint
from candor.app.writing.verdict import reliability

router = APIRouter()


@router.post("/v1/reliability", responses=ERRORS)
async def score_response(body: ScoreRequest, request: Request, services: Given) -> Score:
    """The verdict on a given prompt and response, by the same estimator as for answers."""
    model = services.model(body.model)
    order = model.desk.pair(body)
    within_s = seconds_for(request, services.request_timeout_s)
    services.admission.check(1, order.tokens)
    services.token_rate.take(request.state.caller, order.tokens)
    verdict = await unless_interrupted(
        model.service.score_pair(order), request.receive, services.watch, within_s
    )
    given = GivenVerdict(f"rel-{uuid.uuid4().hex}", 0, verdict, model.bundle.digest)
    if services.feedback is not None:
        services.feedback.note([given])
    return Score(
        id=given.id,
        model=model.name,
        system_fingerprint=fingerprint(model.bundle.digest),
        reliability=reliability([(0, verdict)]),
    )
