"""Middleware of every request: its id and log line, the check of its key and rate, and the limits on its body.

The order, outermost first, is RequestId, (CORS,) Hosts, Gate, BodyLimit, HeadAsGet, the application.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from time import perf_counter

from fastapi import HTTPException
from starlette._utils import get_route_path  # what the router goes by, so that both mean the same path
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candor.app.edge.connections import BODY_TIMEOUT_S
from candor.app.edge.errors import CLIENT_CLOSED_REQUEST, describe
from candor.app.edge.keys import Forbidden, KeyRing, Unauthorized
from candor.app.edge.keys import Scope as KeyScope
from candor.app.edge.limits import RateLimit, TooFast
from candor.app.process.ending import Leaving
from candor.app.telemetry.audit import AuditLog
from candor.app.telemetry.logs import request_id

logger = logging.getLogger("candor")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN = frozenset({"/livez", "/readyz", "/health", "/ping", "/v1/health/live", "/v1/health/ready"})
"""Paths of health checks, which need no key; they reveal nothing else."""

_QUIET = OPEN | {"/metrics", "/load"}
"""Machines poll these paths every few seconds; their log lines would bury the others."""

_AUDITED = ("/v1/", "/invocations", "/tokenize", "/detokenize")
"""Beginnings of the paths that use the model; whoever may ask for answers may use them."""

_MOST_LOGGED = 1 << 16
_BODIES_AT_ONCE = 64
"""Bodies of the largest size that are held at once, in bytes; beyond it, 503."""


def scope_of(path: str, *, deep: bool = False) -> KeyScope | None:
    """Returns the scope that a path needs, or None if it is open. deep: whether the check runs the model."""
    if path in OPEN:
        return "operate" if deep else None
    if path in ("/console", "/docs") or path.startswith("/console/"):
        return None  # the pages have no secrets; they get their data from the API with the reader's key
    if path == "/v1/reliability/feedback":
        return "feedback"
    if path in ("/v1/reliability/queue", "/v1/reliability/labels"):
        return "review"
    if path.startswith(_AUDITED) or path in ("/version", "/openapi.json"):
        return "answer"
    return "operate"


def _asks_deep(scope: Scope) -> bool:
    return QueryParams(scope["query_string"]).get("deep", "false") != "false"


class RequestId:
    """Sets `x-request-id` on every response: the client's own if it is well formed, else a new one.

    It surrounds the other layers, so it also responds if they fail, and it logs one line per request.
    log_bodies: whether it also logs the bodies of requests and responses. leaving: once begun, each response asks
    its client to connect anew, so that it comes to another server.
    """

    def __init__(self, app: ASGIApp, leaving: Leaving, audit: AuditLog, log_bodies: bool = False) -> None:
        self._app = app
        self._leaving = leaving
        self._audit = audit
        self._log_bodies = log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if _ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(current)
        began = perf_counter()
        status = CLIENT_CLOSED_REQUEST
        came, went = bytearray(), bytearray()

        async def receive_and_keep() -> Message:
            message = await receive()
            came.extend(message.get("body", b"")[: _MOST_LOGGED - len(came)])
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = current
                if self._leaving.begun:
                    headers["connection"] = "close"
            elif self._log_bodies:
                went.extend(message.get("body", b"")[: _MOST_LOGGED - len(went)])
            await send(message)

        try:
            await self._app(scope, receive_and_keep if self._log_bodies else receive, send_with_id)
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status != CLIENT_CLOSED_REQUEST:
                raise
            await describe(error).response()(scope, receive, send_with_id)
        finally:
            seconds = perf_counter() - began
            self._log(scope, status, seconds)
            if get_route_path(scope).startswith(_AUDITED):
                self._audit.write(scope, current, status, seconds)
            if self._log_bodies:
                logger.info("came=%r went=%r", bytes(came), bytes(went))

    @staticmethod
    def _log(scope: Scope, status: int, seconds: float) -> None:
        level = logging.DEBUG if get_route_path(scope) in _QUIET and status < 400 else logging.INFO
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "caller": scope.get("state", {}).get("caller"),
        }
        message = "%(method)s %(path)s %(status)d in %(seconds).3f s for %(caller)s"
        logger.log(level, message, fields, extra=fields)


class Hosts:
    """Responds 421 to a request for a host name that is not this server's.

    A web page can make its own name point to this machine (DNS rebinding), and the browser that shows it then takes
    this server for the page's own. allowed: names without port; None allows all. Probes may use any.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._allowed is not None and get_route_path(scope) not in OPEN:
            given = Headers(scope=scope).get("host", "")
            if _without_port(given) not in self._allowed:
                error = HTTPException(
                    421,
                    f"this server has not the name {given[:100]!a}; its operator can set CANDOR_ALLOWED_HOSTS",
                )
                await describe(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    return name.lower().rstrip(".")


class HeadAsGet:
    """Answers HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Gate:
    """Checks key, scope and rate, and responds 401, 403 or 429 without reading the body.

    keys: None admits everybody, as a single caller. rate: limit on requests for answers.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, rate: RateLimit) -> None:
        self._app = app
        self._keys = keys
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._admit(scope)
            except (Unauthorized, Forbidden, TooFast) as error:
                await describe(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        needed = scope_of(get_route_path(scope), deep=_asks_deep(scope))
        state = scope.setdefault("state", {})
        state["caller"], state["key"] = "anyone", None
        if needed is None:
            return
        if self._keys is not None:
            state["caller"] = "unknown"
            key = self._keys.find(_presented(Headers(scope=scope)))
            if key is None:
                raise Unauthorized
            state["caller"], state["key"] = key.name, key
            if needed not in key.scopes:
                raise Forbidden(needed)
        if needed == "answer" and scope["method"] == "POST":
            self._rate.take(state["caller"])


def _presented(headers: Headers) -> str:
    """Returns the key as OpenAI's clients send it, or as Anthropic's do; `""` if none came."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


class BodyLimit:
    """Responds 413 to a body that is, or is declared, larger than `most` bytes, and 408 to one that is too slow."""

    def __init__(self, app: ASGIApp, most: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._most = most
        self._timeout_s = timeout_s
        self._held = 0  # bytes of all bodies whose requests are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else self._most + 1
        received = 0
        whole = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def receive_at_most() -> Message:
            nonlocal received, whole
            try:
                async with asyncio.timeout_at(None if whole else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body has to be here within {self._timeout_s:g} s, this one is not"
                ) from None
            came = len(message.get("body", b""))
            received += came
            self._held += came
            whole = not message.get("more_body", False)
            if max(size, received) > self._most:
                raise HTTPException(
                    413, f"the body may have {self._most} bytes on this server, this one has more"
                )
            if self._held > self._most * _BODIES_AT_ONCE:
                raise HTTPException(
                    503, "the bodies of too many requests are held at once; try later", {"retry-after": "1"}
                )
            return message

        try:
            await self._app(scope, receive_at_most, send)
        finally:
            self._held -= received
