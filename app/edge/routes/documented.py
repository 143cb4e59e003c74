"""The responses that routes declare in the OpenAPI document, beside their own body."""

from __future__ import annotations

from typing import Any

from candor.app.edge.schemas.errors import ErrorBody

_MEANINGS = {
    400: "The body is not JSON, a field is wrong or not supported, or prompt and answer exceed the model's context.",
    401: "No key came, or an unknown one.",
    403: "The key lacks the scope for this.",
    404: "The model is not served here, or the answer is not known.",
    409: "Another bundle answers than the one that is pinned, or the bundle is not promoted.",
    408: "The body comes too slowly.",
    413: "The body is too large.",
    429: "The key has had its share for now.",
    500: "The engine or the server failed.",
    503: "Overloaded, not answered in time, or the engine is dead.",
}

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; a stream where one is asked for."}
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}
