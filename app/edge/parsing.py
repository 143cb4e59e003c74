"""Parsing of request bodies, so that none holds the event loop for long.

JSON's cost lies in its containers: a megabyte of `[],[],...` takes ten times as long as a megabyte of text. So their
number is bounded before anything is parsed. What a field may hold is bounded in the schemas.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

MOST_CONTAINERS = 1 << 15
"""Maximum opening brackets and braces of a body, those within texts included."""


class _BoundedRequest(Request):
    async def json(self) -> Any:
        """Raises HTTPException for a body that cannot be read, and JSONDecodeError for one that is not JSON."""
        body = await self.body()
        if encoding := self.headers.get("content-encoding", "").strip():
            raise HTTPException(400, f"the body is compressed ({encoding[:40]!a}); send it as it is")
        containers = body.count(b"[") + body.count(b"{")
        if containers > MOST_CONTAINERS:
            raise HTTPException(
                400, f"a body may have {MOST_CONTAINERS} brackets and braces, this one has {containers}"
            )
        try:
            # Half a surrogate pair is left to the field's own check, which says where it is.
            return json.loads(body.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise HTTPException(400, f"expected UTF-8, but byte {error.start} of the body is not") from None
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except ValueError:  # Python bounds the digits of an integer
            raise HTTPException(400, "the body has a number of too many digits") from None


class BoundedRoute(APIRoute):
    """A route whose body is parsed as above."""

    @staticmethod
    def bounded(request: Request) -> Request:
        """Returns the request with its `json` bounded."""
        return (
            request
            if isinstance(request, _BoundedRequest)
            else _BoundedRequest(request.scope, request.receive)
        )

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(self.bounded(request))

        return bounded
