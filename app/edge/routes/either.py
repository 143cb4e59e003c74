"""Which handler answers a body: this server's own, or vLLM's (`routes.surface`).

What this server's schema takes whole is answered by its own handler, which costs least. A body with anything more
goes to vLLM's. A body is parsed and validated here, once, and not again by FastAPI.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.services import Services, services_of

if TYPE_CHECKING:
    from candor.engine.vllm_handlers import Kind

Answering = Callable[[Any, Request, Services], Awaitable[Response]]
"""This server's own handler of a validated body."""


def either(kind: Kind, own: type[BaseModel]) -> type[BoundedRoute]:
    """Returns a route class that gives vLLM's handler what the schema `own` does not take whole."""

    class Either(BoundedRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            async def chosen(request: Request) -> Response:
                request = self.bounded(request)
                body = await json_object(request)
                return await answered(kind, own, self.endpoint, body, request, services_of(request))

            return chosen

    return Either


async def answered(
    kind: Kind,
    own: type[BaseModel],
    answer: Answering,
    body: dict[str, Any],
    request: Request,
    services: Services,
) -> Response:
    """Returns the response of `answer`, or of vLLM's handler where the schema `own` does not take the body whole, or
    vLLM's options say what only its handlers write.

    Raises RequestValidationError for what `own` does not take where the engine is not vLLM.
    """
    if services.surface is not None and kind in services.surface.handlers.alone:
        return await services.surface.respond(kind, body, request, services)
    try:
        with told_where():
            taken = own.model_validate(body)
    except RequestValidationError:
        if services.surface is None:
            raise
        return await services.surface.respond(kind, body, request, services)
    return await answer(taken, request, services)


@contextmanager
def told_where(*at: str) -> Iterator[None]:
    """Raises RequestValidationError, which says where in the body, for pydantic's error. at: path of what is read."""
    try:
        yield
    except ValidationError as error:
        found = [one | {"loc": ("body", *at, *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from error


async def json_object(request: Request) -> dict[str, Any]:
    """Returns the body, a JSON object that is sent as JSON. Raises RequestValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not await request.body() or not is_json:
        raise _no_object(kind)
    try:
        body = await request.json()
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON", "ctx": {"error": error.msg}}]
        ) from error
    if not isinstance(body, dict):
        raise _no_object(body)
    return dict(body)


def _no_object(given: Any) -> RequestValidationError:
    what = {"type": "model_attributes_type", "loc": ("body",), "msg": "a JSON object", "input": given}
    return RequestValidationError([what])
