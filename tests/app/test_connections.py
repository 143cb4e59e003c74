"""Bounds on connections, on a real socket: each flood is refused or cut, costs no memory, and others are answered.

The application behind them answers every request with its path's length, so nothing of Candor's is in the way.
"""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

from candor.app.edge.connections import DEFAULT, BoundedProtocol, Bounds, Connections, most_connections

SHORT = Bounds(head_s=0.3, body_s=0.3, read_s=0.3)
HEAD = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
GET = HEAD + b"\r\n"


@dataclass
class Served:
    port: int
    connections: Connections
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(10)
        return connection

    def send(self, parts: Sequence[bytes]) -> bytes:
        """Sends the parts and returns what came until the other side closed. It reads while it writes."""
        came = bytearray()
        with self.connect() as connection:

            def read() -> None:
                try:
                    while part := connection.recv(1 << 16):
                        came.extend(part)
                except OSError:
                    pass

            reader = threading.Thread(target=read)
            reader.start()
            try:
                for part in parts:
                    connection.sendall(part)
            except OSError:
                pass
            reader.join(10)
        return bytes(came)

    def answers(self) -> None:
        assert httpx.get(f"{self.url}/livez", timeout=5).status_code == 200


@contextmanager
def served(most: int = 100, each: int = 100, bounds: Bounds = DEFAULT) -> Iterator[Served]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass
        body = b"x" * (50_000_000 if scope["path"] == "/much" else len(scope["path"]))
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(body), 1 << 16):
            part = body[start : start + (1 << 16)]
            await send(
                {"type": "http.response.body", "body": part, "more_body": start + len(part) < len(body)}
            )

    found: Counter[str] = Counter()
    connections = Connections(most, each, lambda cause: found.update([cause]), bounds)
    config = uvicorn.Config(app, http=connections.protocol, ws="none", log_config=None, lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(listener.getsockname()[1], connections, found)
        finally:
            server.should_exit = True
            server.force_exit = True
            thread.join(10)


def error(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


MB = 1 << 20
FLOODS: dict[str, tuple[list[bytes], int, str]] = {
    "many headers": ([HEAD, *[b"a:b\r\n" * 20_000] * 50], 431, "head_size"),
    "101 headers": ([HEAD, b"a: b\r\n" * 100, b"\r\n"], 431, "head_size"),
    "one long header": ([HEAD + b"a: ", *[b"x" * MB] * 20], 431, "head_size"),
    "one long name": ([HEAD, *[b"x" * MB] * 20], 431, "head_size"),
    "a long URL": ([b"GET /", *[b"x" * MB] * 20], 414, "head_size"),
    "a long URL that ends": ([b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"], 414, "head_size"),
    "many blank lines": ([HEAD, *[b"a:\r\n" * 20_000] * 20], 431, "head_size"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_before_any_key_is_told_why(name: str) -> None:
    parts, status, cause = FLOODS[name]
    with served() as server:
        found, code = error(server.send(parts))
        assert found == status
        assert code in ("request_header_fields_too_large", "request_uri_too_long")
        assert server.refused == {cause: 1}
        server.answers()


def test_what_is_just_small_enough_is_answered() -> None:
    with served() as server:
        headers = {f"a{i}": "x" * 300 for i in range(90)}
        assert httpx.get(f"{server.url}/{'x' * 4000}", headers=headers).text == "x" * 4001
        assert server.refused == {}


def test_trailers_and_chunk_extensions_count_too() -> None:
    chunked = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with served() as server:
        for rest in ([b"5;x=", *[b"y" * MB] * 5], [b"0\r\na: ", *[b"y" * MB] * 5]):
            server.send([chunked, *rest])
            server.answers()
        assert server.refused == {"head_size": 2}


def test_so_many_pipelined_requests_are_answered_and_no_more() -> None:
    with served() as server:
        came = server.send([GET * 100_000])
        # One that runs, those that wait, and no more.
        assert came.count(b"HTTP/1.1 200 OK") == 1 + server.connections.bounds.pipelined
        assert b"connection: close" in came[came.rindex(b"HTTP/1.1") :]
        assert server.refused == {"pipelined": 1}
        server.answers()


def test_a_few_pipelined_requests_are_answered_in_order() -> None:
    last = b"GET /b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with served() as server:
        came = server.send([b"GET /aaa HTTP/1.1\r\nhost: x\r\n\r\n" + GET + last])
        assert [len(one.partition(b"\r\n\r\n")[2]) for one in came.split(b"HTTP/1.1 ")[1:]] == [4, 6, 2]
        assert server.refused == {}


@pytest.mark.parametrize(("begun", "told"), [(b"", False), (b"GET / HT", True), (HEAD, True)])
def test_a_head_that_does_not_come(begun: bytes, told: bool) -> None:
    with served(bounds=SHORT) as server:
        began = time.monotonic()
        came = server.send([begun])
        assert 0.2 < time.monotonic() - began < 5
        assert came == b"" if not told else error(came) == (408, "request_timeout")
        assert server.refused == {"head_time": 1}


def test_a_head_that_trickles(wait_until: Callable[..., None]) -> None:
    """A byte now and then does not win time."""
    with served(bounds=SHORT) as server:
        with server.connect() as connection:
            began = time.monotonic()
            try:
                for byte in GET * 100:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass
            assert time.monotonic() - began < 5
        wait_until(lambda: server.refused == {"head_time": 1})


def test_a_second_head_has_its_own_time() -> None:
    with served(bounds=SHORT) as server, server.connect() as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.4)  # idle longer than a head may take
        assert server.refused == {}


def test_a_body_that_does_not_come(wait_until: Callable[..., None]) -> None:
    with served(bounds=SHORT) as server:
        assert server.send([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n123"]) == b""
        assert server.refused == {"body_time": 1}


def test_a_client_that_does_not_read_is_cut(wait_until: Callable[..., None]) -> None:
    with served(bounds=SHORT) as server, server.connect() as connection:
        connection.sendall(GET.replace(b"/livez", b"/much"))
        wait_until(lambda: server.refused == {"unread": 1})


@pytest.mark.parametrize(("most", "each", "cause"), [(5, 100, "connections"), (100, 5, "address")])
def test_connections_are_bounded_and_come_back(
    most: int, each: int, cause: str, wait_until: Callable[..., None]
) -> None:
    with served(most, each) as server:
        first = [server.connect() for _ in range(5)]
        for one in first:
            one.sendall(GET)
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
        with server.connect() as sixth:
            assert error(sixth.recv(1000)) == (503, "service_unavailable")
        assert server.refused == {cause: 1}
        first[0].sendall(GET)  # those that are open go on
        assert first[0].recv(1000).startswith(b"HTTP/1.1 200")
        for one in first:
            one.close()
        wait_until(lambda: server.connections.come("127.0.0.1") is None)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 600,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:99999999999 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
    ],
)
def test_what_is_not_http(nonsense: bytes) -> None:
    with served(bounds=SHORT) as server:
        came = server.send([nonsense])
        assert came == b"" or came.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), came
        assert came.count(b"HTTP/1.1 ") <= 1
        server.answers()


def test_an_upgrade_is_answered_and_not_followed() -> None:
    asked = b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %s\r\n\r\n" + b"\x81\x05hello"
    with served() as server:
        for protocol in (b"websocket", b"h2c"):
            came = server.send([asked % protocol])
            assert came.startswith(b"HTTP/1.1 200")
            assert came.endswith(b"xxx")
        server.answers()


def test_files_are_kept_for_everything_else() -> None:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, 256), hard))
        assert most_connections(1024) == min(files, 256) - 64
        assert most_connections(100) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def test_uvicorns_own_calls_are_all_there() -> None:
    """What BoundedProtocol stands on: a uvicorn that renames these must be looked at."""
    base = BoundedProtocol.__mro__[1]
    for name in (
        "on_message_begin",
        "on_url",
        "on_header",
        "on_headers_complete",
        "on_body",
        "on_message_complete",
    ):
        assert name in vars(base)
