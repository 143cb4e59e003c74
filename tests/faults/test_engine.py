"""The engine's process is killed amid streams: everybody is told, and the server ends with an error code."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.faults


def test_kill_9_amid_streams(start_server: Any, ask_body: Any, wait_until: Any) -> None:
    """No stream ends as if it were whole, who waits gets 503, nothing new is answered, no process stays behind."""
    server = start_server()
    server.answers()
    streamed: list[list[str]] = []
    waited: list[httpx.Response | httpx.TransportError] = []
    started = threading.Semaphore(0)
    long = ask_body(stream=True, max_tokens=600, temperature=1.5, seed=1)

    def stream() -> None:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long, timeout=120) as response:
            lines: list[str] = []
            for line in response.iter_lines():
                lines += [line] if line else []
                if len(lines) == 4:
                    started.release()
            streamed.append(lines)

    def wait() -> None:
        try:
            waited.append(
                httpx.post(
                    f"{server.url}/v1/chat/completions",
                    json=long | {"stream": False},
                    timeout=120,
                )
            )
        except httpx.TransportError as error:
            waited.append(error)

    threads = [threading.Thread(target=stream) for _ in range(4)]
    threads += [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        assert started.acquire(timeout=60)
    killed_at = time.monotonic()
    assert server.engines()
    for engine in server.engines():
        engine.kill()
    for thread in threads:
        thread.join(60)
    told_after = time.monotonic() - killed_at
    assert server.process.wait(timeout=60) == 1
    print(f"\nall were told after {told_after:.1f} s, ended after {time.monotonic() - killed_at:.1f} s")

    assert len(streamed) == 4
    for lines in streamed:
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "data: [DONE]" not in lines
        assert not any('"region"' in line for line in lines)
    assert [response.status_code for response in waited if isinstance(response, httpx.Response)] == [503] * 4
    wait_until(lambda: not server.processes(), 60)  # vLLM's worker ends where it sees its engine dead
    print(f"its last process ended after {time.monotonic() - killed_at:.1f} s")
    ours = [
        line for line in server.log.read_text().splitlines() if not line.startswith("(")
    ]  # vLLM's begin so
    assert not [line for line in ours if "Traceback" in line]
