"""Which handler answers a body: this server's own, or vLLM's (`routes.surface`).

What this server's schema takes whole is answered by its own handler, which costs least. A body with anything more
goes to vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.services import services_of

if TYPE_CHECKING:
    from candor.engine.vllm_handlers import Kind

Own = TypeVar("Own", bound=BaseModel)


def either(kind: Kind, own: type[BaseModel]) -> type[BoundedRoute]:
    """Returns a route class that gives vLLM's handler what the schema `own` does not take whole."""

    class Either(BoundedRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def chosen(request: Request) -> Response:
                services = services_of(request)
                request = self.bounded(request)
                if services.surface is not None:
                    body = await json_object(request)
                    if is_beyond(body, own):
                        return await services.surface.respond(kind, body, request, services)
                return await handle(request)

            return chosen

    return Either


def is_beyond(body: dict[str, Any], own: type[BaseModel]) -> bool:
    """Returns whether the schema `own` does not take the body whole."""
    try:
        own.model_validate(body)
    except ValidationError:
        return True
    return False


def parsed(own: type[Own], body: dict[str, Any]) -> Own:
    """Returns the body as `own`. Raises RequestValidationError."""
    with told_where():
        return own.model_validate(body)


@contextmanager
def told_where(*at: str) -> Iterator[None]:
    """Raises RequestValidationError, which says where in the body, for pydantic's error. at: path of what is read."""
    try:
        yield
    except ValidationError as error:
        found = [one | {"loc": ("body", *at, *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from error


async def json_object(request: Request) -> dict[str, Any]:
    """Returns the body, a JSON object. Raises RequestValidationError."""
    try:
        body = await request.json()
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON", "ctx": {"error": error.msg}}]
        ) from error
    if not isinstance(body, dict):
        raise RequestValidationError(
            [{"type": "model_attributes_type", "loc": ("body",), "msg": "a JSON object", "input": body}]
        )
    return dict(body)
