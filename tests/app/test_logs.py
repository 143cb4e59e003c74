"""Log lines: one for each request with its id, none with what was asked or answered, none that a client writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest

from candor.app.telemetry import logs

SECRET = "canary-7c1e"


@pytest.fixture
def lines() -> Iterator[Any]:
    """Starts logging in a form; what was logged so far, line by line."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    uvicorn_level = logging.getLogger("uvicorn").level
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the tests' own client
    stream = StringIO()

    def start(form: logs.LogFormat) -> Any:
        logs.configure(form)
        root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
        return lambda: stream.getvalue().splitlines()

    yield start
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(uvicorn_level)
    logging.getLogger("httpx").setLevel(logging.NOTSET)


def test_every_line_has_its_requests_id(serve: Any, lines: Any, wait_until: Any) -> None:
    logged = lines("text")
    with serve() as server:
        server.engine.script("missing", state="missing")
        for name in ("one", "two"):
            server.client.headers["x-request-id"] = name
            server.chat("missing")
        wait_until(lambda: sum("chat/completions" in line for line in logged()) == 2)
    for name in ("one", "two"):
        ours = [line for line in logged() if f"request={name} " in line]
        assert len(ours) == 2
        assert "WARNING" in ours[0]
        assert "could not be scored" in ours[0]  # written in the depths of the service
        assert ours[1].split(f"request={name} ")[1].startswith("POST /v1/chat/completions 200 in ")
        assert ours[1].endswith(" s for anyone")


def test_json_lines(serve: Any, lines: Any, wait_until: Any) -> None:
    logged = lines("json")
    with serve() as server:
        server.client.get("/v1/nothing", headers={"x-request-id": "seven"})
        wait_until(lambda: any("nothing" in line for line in logged()))
    found = next(entry for entry in map(json.loads, logged()) if entry["request_id"] == "seven")
    assert {name: found[name] for name in ("level", "logger", "method", "path", "status", "caller")} == {
        "level": "INFO",
        "logger": "candor",
        "method": "GET",
        "path": "/v1/nothing",
        "status": 404,
        "caller": "anyone",
    }
    assert found["seconds"] >= 0
    assert "time" in found


def test_probes_are_quiet(serve: Any, lines: Any) -> None:
    logged = lines("text")
    with serve() as server:
        for path in ("/livez", "/readyz", "/health", "/metrics", "/load"):
            assert server.client.get(path).status_code == 200
    assert not [line for line in logged() if "GET" in line]


def everything_that_can_hold_a_secret(server: Any) -> None:
    server.engine.script("fails", fails=ZeroDivisionError("no"))
    server.engine.script("broken", fails=ZeroDivisionError("no"), pieces=())
    server.engine.script("nan", state="nan", pieces=(SECRET,))
    for prompt in ("ask", "fails", "broken", "nan", "{% x %}"):
        for stream in (False, True):
            server.chat(f"{prompt} {SECRET}", stream=stream)
    server.chat(SECRET, temperature=SECRET)
    server.chat(SECRET * 1000)
    server.client.post("/v1/chat/completions", content=f'{{"{SECRET}'.encode())
    server.client.post("/v1/reliability", json={"prompt": SECRET, "response": SECRET})
    server.client.get(f"/v1/models?key={SECRET}")
    server.client.get("/v1/models", headers={"authorization": f"Bearer {SECRET}", "cookie": SECRET})


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_is_asked_and_answered_is_not_logged(serve: Any, lines: Any, form: Any) -> None:
    logged = lines(form)
    with serve() as server:
        everything_that_can_hold_a_secret(server)
    assert len(logged()) > 15
    assert not [line for line in logged() if SECRET in line]


def test_unless_it_is_asked_for(serve: Any, lines: Any) -> None:
    logged = lines("text")
    with serve(log_bodies=True) as server:
        server.engine.script("ask", pieces=("answer-9",))
        server.chat(f"ask {SECRET}")
    [line] = [line for line in logged() if SECRET in line]
    assert "answer-9" in line


def test_nobody_writes_a_line_of_their_own(serve: Any, lines: Any, wait_until: Any) -> None:
    logged = lines("text")
    with serve() as server:
        server.client.get("/v1/a%0A2026-01-01 INFO request=x forged%0D%1B[31m%E2%80%A8%C2%85b")
        wait_until(lambda: any("forged" in line for line in logged()))
    [line] = [line for line in logged() if "forged" in line]
    assert "\\x0a2026-01-01 INFO" in line
    assert "\x1b" not in line
    assert not [line for line in logged() if line.startswith("2026-01-01")]


def test_a_traceback_keeps_its_lines() -> None:
    record = logging.LogRecord("candor", logging.ERROR, "f", 1, "a\nb", (), None)
    record.request_id = "r"
    try:
        raise ValueError("no")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = logs.OneLine().format(record).split("\n")
    assert first.endswith("ERROR request=r a\\x0ab")
    assert rest[0].startswith("Traceback")
