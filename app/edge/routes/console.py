"""`/console`: a page for questions and inspection, served from the files in app/console.

It loads nothing from elsewhere and runs only its own scripts; browsers enforce this by the policy below.
The page itself is not secret. It gets its data from the API, with the reader's key if one is needed.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

CONSOLE = Path(__file__).resolve().parents[2] / "console"

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # browsers revalidate each time and download only changes
}


class Console(StaticFiles):
    """Serves the files, each with the headers above."""

    def __init__(self) -> None:
        super().__init__(directory=CONSOLE, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
