"""Work is given up at once when the client leaves; a dead engine answers nobody and ends the server."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], **more}


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream(server: Any, wait_until: Any, n: int) -> None:
    server.engine.script("slow", hangs=True)
    with server.client.stream("POST", "/v1/chat/completions", json=body(stream=True, n=n)) as response:
        lines = response.iter_lines()  # kept: its end would close the response
        next(lines)
        assert server.engine.running == n
    wait_until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == n
    assert server.client.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_does_not_wait_for_the_first_token(
    server: Any, wait_until: Any, n: int, stream: bool
) -> None:
    server.engine.script("slow", pieces=(), hangs=True)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", json=body(n=n, stream=stream), timeout=0.3)
    wait_until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == n
    assert server.client.get("/load").json() == {"server_load": 0}


def test_a_client_that_leaves_a_buffered_stream(server: Any, wait_until: Any) -> None:
    server.engine.script("slow", hangs=True)
    options = {"mode": "abstain"}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", json=body(stream=True, reliability=options), timeout=0.3)
    wait_until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == 1


def test_a_client_that_stops_reading(serve: Any, engine: Any, wait_until: Any) -> None:
    """The stream stands still while its buffers are full, and is given up when the client closes."""
    engine.script("slow", pieces=("x" * 1000,) * 20_000)
    with serve() as server:
        with server.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.chat("other").status_code == 200
            assert engine.running == 1
        wait_until(lambda: engine.running == 0)
        assert len(engine.cancelled) == 1


def test_a_dying_engine(serve: Any, engine: Any, wait_until: Any) -> None:
    engine.script("slow", hangs=True)
    with serve() as server:
        for path in ("/livez", "/readyz", "/health"):
            assert server.client.get(path).json() == {"status": "ok"}
        waiting: list[httpx.Response] = []

        def wait(**more: Any) -> None:
            waiting.append(httpx.post(f"{server.url}/v1/chat/completions", json=body(**more), timeout=10))

        threads = [threading.Thread(target=wait, kwargs={"stream": stream}) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.running == 2)
        engine.dead = True
        assert server.ended.wait(5)
        for thread in threads:
            thread.join(5)
        plain, streamed = sorted(waiting, key=lambda response: response.status_code, reverse=True)
        assert plain.status_code == 503
        assert plain.json()["error"]["code"] == "engine_dead"
        *_, last, _ = streamed.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert engine.running == 0

        assert server.client.get("/livez").status_code == 200
        for path in ("/readyz", "/health"):
            assert server.client.get(path).status_code == 503
        assert server.chat("ask").status_code == 503


def test_health_asks_now(serve: Any, engine: Any) -> None:
    with serve(engine_check_interval_s=60) as server:
        engine.dead = True
        assert server.client.get("/readyz").status_code == 200
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/readyz").status_code == 503
        assert server.ended.is_set()
