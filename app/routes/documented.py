"""What routes say they may answer with, beside their own body."""

from __future__ import annotations

from typing import Any

from app.schemas.errors import ErrorBody

_MEANINGS = {
    400: "The body is not JSON, or prompt and answer exceed the model's context.",
    404: "The model is not served here.",
    413: "The body is too large.",
    422: "A field is wrong, too large or not supported.",
    500: "The engine or the server failed.",
    503: "Overloaded, or the engine is dead.",
}

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer."}
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}
