"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.rendering import CompletionRenderer, Heading
from app.responding import respond
from app.routes.documented import ERRORS, STREAMED
from app.schemas.openai import Completion, CompletionRequest
from app.state import Given

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=ERRORS | STREAMED)
async def create_completion(body: CompletionRequest, request: Request, services: Given) -> Response:
    """A plain prompt, continued. It leaves the chat format, so its reliability is never calibrated."""
    model = services.model(body.model)
    order = model.desk.completion(body)
    heading = Heading.new("cmpl", model.name, model.bundle.digest)
    renderer = CompletionRenderer(heading, order, include_usage=body.wants_usage)
    return await respond(request, order, renderer, model, services, stream=body.wants_stream)
