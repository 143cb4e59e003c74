"""What happens to every request first: it gets an id, and a body that is too large is refused."""

from __future__ import annotations

import logging
import re
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import describe

logger = logging.getLogger("candor")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """`x-request-id` on every response: the client's own where it is harmless, else a new one.

    The outermost layer, so it also answers where everything within failed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            if started:
                raise
            await describe(error).response()(scope, receive, send_with_id)


class BodyLimit:
    """413 once a body is, or says that it will be, larger than `most` bytes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else self._most + 1
        received = 0

        async def receive_at_most() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(size, received) > self._most:
                raise HTTPException(
                    413, f"the body may have {self._most} bytes on this server, this one has more"
                )
            return message

        await self._app(scope, receive_at_most, send)
