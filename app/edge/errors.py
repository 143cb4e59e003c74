"""The mapping from errors to HTTP, in OpenAI's error body; it is defined only here.

    400  the body is not JSON; a field is wrong, too large, unknown or not supported; prompt and answer exceed the
         model's context
    401  no key, or an unknown one       403  a key without the scope
    404  no such model, answer or path   405  no such method
    408  the body comes too slowly       413  the body is too large
    409  another bundle than the one that is pinned, or one that is not promoted
    429  the key has used up its rate (Retry-After)
    500  the engine or this server failed
    503  overloaded, not answered in time, another bundle is wanted by now, or the engine is dead (Retry-After)

An abstention is not an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from candor.app.answering.waiting import ClientGone, DeadlineExceeded
from candor.app.edge.keys import Forbidden, Unauthorized
from candor.app.edge.limits import Overloaded, Refused, TooFast
from candor.app.edge.schemas.errors import Error, ErrorBody, ErrorType
from candor.app.edge.services import PIN, AnotherBundle, BundleBehind, ModelNotFound
from candor.app.process.ending import ShuttingDown
from candor.app.process.renewal import ChangeNotKept, ChangeUnderWay, NotPromoted
from candor.app.process.selftest import GoldenMismatch
from candor.app.store.records import LabelNotKept, NoSuchAnswer, StoreUnavailable
from candor.engine.base import EngineDead, EngineError, PromptTooLong, RequestRefused
from candor.model_store.errors import BundleNotFound

logger = logging.getLogger("candor")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; it appears only in the log."""


@dataclass(frozen=True)
class HttpError:
    """The HTTP response to one error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> ErrorBody:
        kind: ErrorType = "server_error" if self.status >= 500 else "invalid_request_error"
        return ErrorBody(error=Error(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=dict(self.headers))


def describe(error: Exception) -> HttpError:
    """Maps any error to its response; an unforeseen error gives a bare 500 without its message."""
    match error:
        case ModelNotFound():
            return HttpError(404, str(error), "model", "model_not_found")
        case AnotherBundle():
            return HttpError(409, str(error), "bundle", "bundle_changed", {PIN: error.bundle})
        case BundleBehind():
            return HttpError(503, str(error), None, "bundle_behind", {"Retry-After": "1"})
        case ChangeUnderWay():
            return HttpError(409, str(error), None, "change_under_way")
        case ChangeNotKept():
            return HttpError(503, str(error), None, "change_not_kept", {"Retry-After": "10"})
        case NotPromoted():
            return HttpError(409, str(error), None, "not_promoted")
        case BundleNotFound():
            return HttpError(404, str(error), "bundle", "bundle_not_found")
        case PromptTooLong():
            return HttpError(400, str(error), None, "context_length_exceeded")
        case RequestRefused():
            return HttpError(error.status, str(error), error.param, error.code)
        case Refused():
            return HttpError(400, str(error), error.param, error.code)
        case Unauthorized():
            message = "expected a key that this server knows, sent as `authorization: Bearer KEY`"
            return HttpError(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        case Forbidden():
            return HttpError(403, str(error), None, "insufficient_scope")
        case NoSuchAnswer():
            return HttpError(404, str(error), "id", "answer_not_found")
        case LabelNotKept():
            return HttpError(503, str(error), None, "feedback_not_kept", {"Retry-After": "10"})
        case StoreUnavailable():
            return HttpError(503, str(error), None, "store_unavailable", {"Retry-After": "10"})
        case DeadlineExceeded():
            return HttpError(503, str(error), None, "deadline_exceeded", {"Retry-After": "1"})
        case TooFast():
            return HttpError(
                429, str(error), None, "rate_limit_exceeded", {"Retry-After": str(error.retry_after_s)}
            )
        case Overloaded():
            return HttpError(503, str(error), None, "overloaded", {"Retry-After": str(error.retry_after_s)})
        case EngineDead():
            message = (
                "the engine has ended and the server is about to; send the request to another or try later"
            )
            return HttpError(503, message, None, "engine_dead", {"Retry-After": "30"})
        case RequestValidationError():
            return _describe_validation(error.errors())
        case HTTPException():
            return _describe_http(error)
        case ShuttingDown():
            return HttpError(503, str(error), None, "shutting_down", {"Retry-After": "1"})
        case GoldenMismatch():
            return HttpError(503, str(error), None, "golden_mismatch", {"Retry-After": "30"})
        case EngineError():
            # The engine's own words may hold a prompt or a path.
            return HttpError(
                500, "the engine could not answer; the server's log has the reason", None, "engine_error"
            )
        case _:
            return HttpError(500, "the server failed; its log has the reason", None, "internal_error")


def install(app: FastAPI) -> None:
    """Makes `app` respond to errors with `describe`; `app.edge.middleware` does so for unforeseen ones."""
    for kind in (
        ModelNotFound,
        AnotherBundle,
        BundleBehind,
        NotPromoted,
        BundleNotFound,
        PromptTooLong,
        Refused,
        Overloaded,
        NoSuchAnswer,
        LabelNotKept,
        StoreUnavailable,
        DeadlineExceeded,
        EngineError,
        ShuttingDown,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, _respond)
    app.add_exception_handler(ClientGone, _respond_to_nobody)


def broke_off(what: str, error: Exception) -> None:
    """Logs what failed after its response had begun; with the traceback where nobody foresaw it."""
    foreseen = isinstance(error, EngineError | DeadlineExceeded)
    logger.error("%s broke off: %r", what, error, exc_info=None if foreseen else error)


async def _respond(request: Request, error: Exception) -> Response:
    described = describe(error)
    if isinstance(error, EngineError) and not isinstance(error, PromptTooLong | RequestRefused):
        logger.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return described.response()


async def _respond_to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _describe_http(error: HTTPException) -> HttpError:
    if error.status_code == 400:
        return HttpError(400, error.detail, None, "invalid_json")
    messages = {
        404: "there is nothing at this path",
        405: "this path does not take this method",
    }
    status = HTTPStatus(error.status_code)
    detail = error.detail if error.detail != status.phrase else messages.get(status, error.detail)
    # From Python 3.13 on, 413 is "Content Too Large"; clients know the older name.
    code = "request_entity_too_large" if status == 413 else status.phrase.lower().replace(" ", "_")
    return HttpError(error.status_code, detail, None, code, error.headers or {})


def _describe_validation(errors: Sequence[Any]) -> HttpError:
    first = errors[0]
    location = first["loc"][1:]  # without "body"
    if first["type"] == "unknown_field":
        path = _path([*location, first["ctx"]["name"]])
        return HttpError(400, first["msg"], path, "unknown_parameter")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return HttpError(
            400, f"the body is not JSON: {reason} at character {location[0]}", None, "invalid_json"
        )
    if not location:
        if first["type"] in ("missing", "model_attributes_type"):
            return HttpError(
                400,
                "expected a JSON object as body, sent with content-type: application/json",
                None,
                "invalid_body",
            )
        return HttpError(400, first["msg"], None, "invalid_value")
    path = _path(location)
    if first["type"] == "unsupported":
        return HttpError(400, f"{path} {first['msg']}", path, "unsupported_parameter")
    came = "" if first["type"] == "missing" else f"; got {_clip(first.get('input'))}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return HttpError(400, f"{path}: {first['msg']}{came}{more}", path, "invalid_value")


def _path(location: Sequence[str | int]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def _clip(value: Any, longest: int = 80) -> str:
    """Shortens a value for a message and makes it ASCII, so that it can always be sent."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    shown = ascii(value[:longest] if isinstance(value, str) else value)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
