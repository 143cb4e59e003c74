"""The HTTP settings that `candor batch` and `candor chat` share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "CANDOR_API_KEY"
"""It is no option, because everybody can read options in the list of processes."""

ANSWER_TIMEOUT_S = 900.0
"""Longer than the server's own limit, so that the client sees the server's error."""

Url = Annotated[str, typer.Option(help=f"Address of the server; an API key is taken from {KEY_VARIABLE}.")]


def client_settings(url: str) -> dict[str, Any]:
    """Returns keyword arguments for httpx.Client or AsyncClient."""
    import httpx

    key = os.environ.get(KEY_VARIABLE)
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(ANSWER_TIMEOUT_S, connect=10),
    }


def explanation(response: httpx.Response) -> str:
    """Returns the message of an error response."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
