"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from candor.app.edge.responding import respond
from candor.app.edge.routes.documented import ERRORS, STREAMED
from candor.app.edge.schemas.openai import ChatCompletion, ChatCompletionRequest
from candor.app.edge.services import Given
from candor.app.writing.bodies import ChatRenderer, Heading

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS | STREAMED)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: Given) -> Response:
    """An answer to a conversation, with its reliability."""
    model = services.model(body.model)
    order = model.desk.chat(body)
    heading = Heading.new("chatcmpl", model.name, model.bundle.digest)
    renderer = ChatRenderer(heading, order, include_usage=body.wants_usage)
    return await respond(request, order, renderer, model, services, stream=body.wants_stream)
