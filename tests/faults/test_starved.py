"""A machine that is too busy or has no files left is waited for, an engine that is stopped is not.

The tests share the server and stand in order: the last one ends it.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.faults

STALL_S = 8


@pytest.fixture(scope="module")
def server(start_server: Any) -> Any:
    server = start_server(CANDOR_ENGINE_STALL_TIMEOUT_S=str(STALL_S), CANDOR_REQUEST_TIMEOUT_S="120")
    server.answers()
    return server


def test_no_files_left(server: Any, wait_until: Any) -> None:
    """64 connections where 8 fit: whoever has one is answered, and all are once files are there again."""
    files, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (server.files() + 8, hard))
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    try:
        with httpx.Client(base_url=server.url, timeout=30) as client, ExitStack() as stack:
            assert client.get("/livez").status_code == 200
            for _ in range(64):
                with suppress(OSError):
                    stack.enter_context(socket.create_connection(address, timeout=5))
            time.sleep(1)
            assert client.get("/livez").status_code == 200
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (files, hard))
    wait_until(lambda: httpx.get(f"{server.url}/livez", timeout=10).status_code == 200, 30)
    server.answers()


def test_a_starved_engine_is_waited_for(server: Any, ask_body: Any, wait_until: Any) -> None:
    """Its threads share one processor with others that go before them: new requests are refused, nothing ends."""
    processor = min(os.sched_getaffinity(0))
    was = {}
    for process in server.processes():
        if process.pid == server.process.pid:
            continue
        was[process.pid] = process.cpu_affinity()
        subprocess.run(["taskset", "-acp", str(processor), str(process.pid)], check=True, capture_output=True)
        for thread in process.threads():
            os.setpriority(os.PRIO_PROCESS, thread.id, 19)
    spin = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"]
    # Each in a session of its own: where the kernel groups by sessions, niceness counts within one alone.
    others = [subprocess.Popen(spin, start_new_session=True) for _ in range(24)]
    answer: list[httpx.Response] = []

    def ask() -> None:
        answer.append(httpx.post(f"{server.url}/v1/chat/completions", json=ask_body(), timeout=200))

    asking = threading.Thread(target=ask)
    asking.start()
    began = time.monotonic()
    refused = None
    try:
        while time.monotonic() - began < 4 * STALL_S and server.process.poll() is None:
            time.sleep(1)
            probe = httpx.post(
                f"{server.url}/v1/chat/completions",
                json=ask_body(),
                timeout=60,
                headers={"x-request-timeout": "1"},
            )
            error = probe.json().get("error") or {}
            if "processor time" in error.get("message", ""):
                refused = time.monotonic() - began
                metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
                share = float(metrics.split("\ncandor_engine_processor_share ")[1].split()[0])
                break
        while time.monotonic() - began < 4 * STALL_S:  # longer than a stuck engine is given
            assert server.process.poll() is None, server.log.read_text()[-2000:]
            time.sleep(0.5)
    finally:
        for other in others:
            other.kill()
            other.wait()
        for pid in was:
            with suppress(psutil.NoSuchProcess):
                allowed = ",".join(map(str, was[pid]))
                subprocess.run(["taskset", "-acp", allowed, str(pid)], check=True, capture_output=True)
                for thread in psutil.Process(pid).threads():
                    os.setpriority(os.PRIO_PROCESS, thread.id, 0)
    assert refused is not None, "it did not say that it is starved"
    print(f"\nrefused new requests after {refused:.1f} s, with a share of {share:.3f}")
    asking.join(120)
    assert [one.status_code for one in answer] == [200]
    wait_until(lambda: "candor_engine_starved 0.0" in httpx.get(f"{server.url}/metrics", timeout=30).text, 30)
    server.answers()


def test_a_stopped_engine_ends_the_server(server: Any, ask_body: Any) -> None:
    """SIGSTOP: it asks for no processor time and makes no step."""
    for process in server.engines():
        process.suspend()
    began = time.monotonic()
    response = httpx.post(f"{server.url}/v1/chat/completions", json=ask_body(), timeout=120)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    told = time.monotonic() - began
    assert server.process.wait(timeout=90) == 1
    print(f"\ntold after {told:.1f} s, ended after {time.monotonic() - began:.1f} s")
    assert 2 * STALL_S - 2 <= told < 4 * STALL_S
    assert "it is stuck: no token within" in server.log.read_text()
