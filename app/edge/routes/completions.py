"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from candor.app.edge.responding import respond
from candor.app.edge.routes.documented import ERRORS, STREAMED
from candor.app.edge.schemas.openai import Completion, CompletionRequest
from candor.app.edge.services import Given
from candor.app.writing.bodies import CompletionRenderer, Heading

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=ERRORS | STREAMED)
async def create_completion(body: CompletionRequest, request: Request, services: Given) -> Response:
    """A plain prompt, continued. It leaves the chat format, so its reliability is never calibrated."""
    model = services.model(body.model)
    order = model.desk.completion(body)
    heading = Heading.new("cmpl", model.name, model.bundle.digest)
    renderer = CompletionRenderer(heading, order, include_usage=body.wants_usage)
    return await respond(request, order, renderer, model, services, stream=body.wants_stream)
