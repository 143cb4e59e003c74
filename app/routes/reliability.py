"""`POST /v1/reliability`: what is known of a response that somebody already has."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request

from app.interruption import unless_interrupted
from app.rendering import fingerprint
from app.routes.documented import ERRORS
from app.schemas.scoring import Score, ScoreRequest
from app.state import Given
from app.verdict import reliability

router = APIRouter()


@router.post("/v1/reliability", responses=ERRORS)
async def score_response(body: ScoreRequest, request: Request, services: Given) -> Score:
    """The verdict on a given prompt and response, by the same estimator as for answers."""
    order = services.desk.pair(body)
    verdict = await unless_interrupted(services.service.score_pair(order), request.receive, services.watch)
    return Score(
        id=f"rel-{uuid.uuid4().hex}",
        model=services.desk.model_name,
        system_fingerprint=fingerprint(services.bundle.digest),
        reliability=reliability([(0, verdict)]),
    )
