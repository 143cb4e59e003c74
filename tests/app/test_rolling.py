"""A rolling update fails no request: a server that is told to end says first that it is not ready, and listens on.

Two servers in processes of their own, ended and started again one after the other, as a Deployment does. In front of
them stands what a load balancer does: it sends each request to a server whose `/readyz` was well at its last look.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from collections import Counter
from typing import Any

import httpx
import pytest

DELAY_S = 2.0
LOOK_S = 0.2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Balancer:
    """Looks at each server's readiness, as a Service's endpoints do, and hands out ready ones in turn."""

    def __init__(self, ports: list[int]) -> None:
        self.ready = dict.fromkeys(ports, False)
        self._turn = itertools.count()
        self._end = threading.Event()
        self._looking = threading.Thread(target=self._look)
        self._looking.start()

    def next(self) -> int:
        ready = [port for port, well in self.ready.items() if well]
        return ready[next(self._turn) % len(ready)]

    def close(self) -> None:
        self._end.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._end.wait(LOOK_S):
            for port in self.ready:
                try:
                    self.ready[port] = (
                        httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200
                    )
                except httpx.HTTPError:
                    self.ready[port] = False


def test_no_request_fails_in_a_rolling_update(start_replica: Any, wait_until: Any) -> None:
    ports = [free_port(), free_port()]
    given = {"CANDOR_SHUTDOWN_DELAY_S": str(DELAY_S)}
    replicas = {port: start_replica(port, **given) for port in ports}
    balancer = Balancer(ports)
    wait_until(lambda: all(balancer.ready.values()), 20)
    outcomes: Counter[str] = Counter()
    end = threading.Event()

    def ask(prompt: str, stream: bool, *, keep: bool) -> None:
        """One client after another, or one that keeps its connections."""
        clients = {port: httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) for port in ports}
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "stream": stream}
        while not end.is_set():
            port = balancer.next()
            try:
                response = clients[port].post("/v1/chat/completions", json=body)
                whole = response.text.endswith("data: [DONE]\n\n") if stream else response.is_success
                outcomes[str(response.status_code) if whole else "cut"] += 1
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1
            if not keep:
                clients[port].close()
                clients[port] = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
            time.sleep(0.01)
        for client in clients.values():
            client.close()

    askers = [
        threading.Thread(target=ask, args=(prompt, stream), kwargs={"keep": keep})
        for prompt, stream in (("quick", False), ("slow", True))
        for keep in (True, False)
        for _ in range(2)
    ]
    for asker in askers:
        asker.start()
    try:
        for port in ports:
            asked = outcomes.total()
            wait_until(lambda asked=asked: outcomes.total() > asked + 20, 20)
            told = time.monotonic()
            os.kill(replicas[port].process.pid, signal.SIGTERM)
            assert replicas[port].process.wait(30) == 0
            print(
                f"\nended {time.monotonic() - told:.1f} s after SIGTERM, {outcomes.total()} requests so far"
            )
            assert time.monotonic() - told >= DELAY_S
            replicas[port] = start_replica(port, **given)
            wait_until(lambda port=port: balancer.ready[port], 20)
    finally:
        end.set()
        for asker in askers:
            asker.join(30)
        balancer.close()
    print(f"{dict(outcomes)}")
    assert set(outcomes) == {"200"}
    assert outcomes["200"] > 100


def test_it_says_that_it_leaves_and_listens_on(start_replica: Any, wait_until: Any) -> None:
    replica = start_replica(CANDOR_SHUTDOWN_DELAY_S="1.5")
    with httpx.Client(base_url=replica.url, timeout=20) as client:
        assert client.get("/readyz").status_code == 200
        os.kill(replica.process.pid, signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{replica.url}/readyz").status_code == 503)
        refused = client.get("/readyz")
        assert refused.json()["error"]["code"] == "shutting_down"
        assert client.get("/livez").status_code == 200
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"  # so that the client comes to another next time
    assert replica.process.wait(20) == 0


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_whoever_is_in_a_hurry_need_not_wait(start_replica: Any, signals: list[int]) -> None:
    replica = start_replica(CANDOR_SHUTDOWN_DELAY_S="60")
    began = time.monotonic()
    for number in signals:
        os.kill(replica.process.pid, number)
        time.sleep(0.3)
    assert replica.process.wait(20) == 0
    assert time.monotonic() - began < 20
