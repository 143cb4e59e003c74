"""Bounds on connections: they hold before a request is complete, so before its key is known.

    a connection  ->  at most so many, in all and from one address; else 503
    a head        ->  so many bytes and headers, within so many seconds; else 408, 414 or 431
    a body        ->  within so many seconds (BodyLimit answers 408; here the connection ends a little later)
    pipelining    ->  so many requests wait on a connection; what follows them is not read
    a response    ->  the client reads on within so many seconds; else the connection is cut

uvicorn bounds none of these with httptools: that parser keeps a line until it is whole, and a connection that sends
nothing, or half a head, stays for good. So this is uvicorn's protocol with counts and timers around its parser.
The parser is fed in small slices, because a bound can only be looked at between two slices.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("candor")

KEEP_ALIVE_S = 75
"""Seconds that an idle connection stays open: longer than clients keep one, so none sends into a closed one."""
BODY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Bounds:
    """Of one connection. Times are in seconds, sizes in bytes.

    head_s: from the connection's beginning, or from the head's first byte, until the head is whole.
    body_s: from the head's end until the body is whole. read_s: until the client reads on.
    """

    head_bytes: int = 1 << 15
    url_bytes: int = 1 << 14
    headers: int = 100
    pipelined: int = 8
    head_s: float = 10.0
    body_s: float = BODY_TIMEOUT_S + 5.0  # the application answers first
    read_s: float = 60.0


DEFAULT = Bounds()

_FILES_KEPT = 64
_SLICE = 1 << 14
_LINGER_S = 2.0  # a close with unread input would reset the connection before the client reads the answer
_NOT_HTTP = "expected a request in HTTP/1.1, got something else"


class _TooMuch(Exception):
    """Raised within the parser's callbacks; httptools wraps it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Full(Exception):
    """So many pipelined requests wait that no more is read."""


def most_connections(wanted: int) -> int:
    """Returns the number of connections that leaves files for everything else. wanted: at most so many."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(8, min(wanted, files - _FILES_KEPT))


class Connections:
    """Counts open connections. most: in all. most_each: from one address.

    refused: called with the cause, one of `CAUSES`, for every connection that is refused or cut.
    """

    CAUSES = (
        "connections",
        "address",
        "head_size",
        "head_time",
        "body_time",
        "pipelined",
        "upgrade",
        "unread",
    )

    def __init__(
        self,
        most: int,
        most_each: int,
        refused: Callable[[str], None] = lambda cause: None,
        bounds: Bounds = DEFAULT,
    ) -> None:
        self._most = most
        self._most_each = most_each
        self._by_address: Counter[str] = Counter()
        self.refused = refused
        self.bounds = bounds

    def come(self, address: str) -> str | None:
        """Counts a connection that was opened. Returns why it must be refused, or None."""
        self._by_address[address] += 1
        if self._by_address.total() > self._most:
            return "connections"
        return "address" if self._by_address[address] > self._most_each else None

    def go(self, address: str) -> None:
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def protocol(self, **given: Any) -> BoundedProtocol:
        """uvicorn calls this for each connection."""
        protocol = BoundedProtocol(**given)
        protocol.all = self
        return protocol


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    all: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._deaf = False  # nothing more is read from this connection
        self._head_bytes = 0  # since the last head or piece of a body was whole: trailers count too
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None  # of the head or the body that is being received
        self._unread: asyncio.TimerHandle | None = None
        if cause := self.all.come(self._address):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open; try later", cause)
            return
        self._expect(self.all.bounds.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.go(self._address)
        self._expect(None)
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._deaf and not self.transport.is_closing():
            part, view = view[:_SLICE], view[_SLICE:]
            if self._in_head and not self._head_bytes:
                self._expect(self.all.bounds.head_s, self._head_is_late)
            self._head_bytes += len(part)
            self._feed(part)
            if self._head_bytes > self.all.bounds.head_bytes and not self._deaf:
                self._refuse_head(
                    f"the request's head may have {self.all.bounds.head_bytes} bytes, this one has more"
                )

    def _feed(self, part: memoryview) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserCallbackError as error:
            match error.__context__:
                case _Full():
                    self._leave_rest("pipelined")
                case _TooMuch() as fault:
                    self._refuse(fault.status, str(fault), "head_size")
                case other:
                    logger.warning("a request that the parser gives up on: %r", other)
                    self._refuse(HTTPStatus.BAD_REQUEST, _NOT_HTTP, None)
        except httptools.HttpParserUpgrade:
            self._leave_rest("upgrade")  # no route speaks another protocol; the request itself is answered
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, _NOT_HTTP, None)

    # httptools' callbacks

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self.all.bounds.pipelined:
            raise _Full
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.all.bounds.url_bytes:
            raise _TooMuch(
                HTTPStatus.REQUEST_URI_TOO_LONG,
                f"the URL may have {self.all.bounds.url_bytes} bytes, this one has more",
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self.all.bounds.headers:
            raise _TooMuch(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"a request may have {self.all.bounds.headers} headers, this one has more",
            )
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._expect(self.all.bounds.body_s, self._body_is_late)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._expect(None)
        super().on_message_complete()

    # The other direction

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.all.bounds.read_s, self._is_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _should_upgrade(self) -> bool:
        return False

    def _expect(self, within_s: float | None, late: Callable[[], None] = lambda: None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if within_s is None else self.loop.call_later(within_s, late)

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request's head comes too slowly", "head_time")
        else:  # nothing was asked
            self.all.refused("head_time")
            self.transport.close()

    def _body_is_late(self) -> None:
        self.all.refused("body_time")
        self.transport.abort()

    def _is_unread(self) -> None:
        self.all.refused("unread")
        self.transport.abort()

    def _refuse_head(self, message: str) -> None:
        # httptools gives a line only once it is whole, so an endless URL shows by its having given nothing.
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if self.url else HTTPStatus.REQUEST_URI_TOO_LONG
        self._refuse(status, message, "head_size")

    def _leave_rest(self, cause: str) -> None:
        """Answers what came so far, then closes."""
        self.all.refused(cause)
        self._deaf = True
        self._expect(None)
        self.cycle.keep_alive = False

    def _refuse(self, status: HTTPStatus, message: str, cause: str | None) -> None:
        """Answers at once and closes, unless an earlier request is still being answered: then it only closes."""
        if cause:
            self.all.refused(cause)
        self._deaf = True
        self._expect(None)
        if self.cycle is None or self.cycle.response_complete:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            code = status.phrase.lower().replace(" ", "_").replace("-", "_")
            error = {"message": message, "type": kind, "param": None, "code": code}
            body = json.dumps({"error": error}).encode()
            retry = b"retry-after: 1\r\n" if status >= 500 else b""
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s"
                b"connection: close\r\n\r\n%s" % (status, status.phrase.encode(), len(body), retry, body)
            )
        if cause == "head_size" and self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.abort)
        else:
            self.transport.close()
