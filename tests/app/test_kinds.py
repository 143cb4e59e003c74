"""Whatever comes over a connection: its own error or none, at little cost, and the next request is answered.

pytest tests/app/test_kinds.py                          the whole server over HTTP, a script as its engine
CANDOR_ENGINE=vllm pytest tests/app/test_kinds.py       a real vLLM
"""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

HELD_S = 0.05
MOST_BYTES = 16 << 20
MOST_S = 30.0
"""A request with a grammar may take some: a machine that is busy compiles it slowly."""


def answer_to(port: int, raw: bytes) -> tuple[int, bytes]:
    """Status and body; 0 where the connection was closed without an answer."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=MOST_S) as connection:
        try:
            connection.sendall(raw)
            while piece := connection.recv(1 << 16):
                received = (received + piece).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
                head, _, body = received.partition(b"\r\n\r\n")
                if b"content-length: " in head and len(body) >= int(
                    head.partition(b"content-length: ")[2].split()[0]
                ):
                    break
        except ConnectionError:  # it may be cut while it is sent
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0), body


def test_inputs_of_a_hundred_kinds(start_replica: Any, kinds: Any, wait_until: Any) -> None:
    replica = start_replica()
    wait_until(lambda: len(replica.held()) > 0, 60)
    port = httpx.URL(replica.url).port
    assert len({one.name for one in kinds.INPUTS}) == len(kinds.INPUTS) >= 100
    httpx.post(f"{replica.url}/v1/chat/completions", json={"model": "tiny", "messages": kinds.MESSAGES})
    faults, memory = [], replica.memory
    for one in kinds.INPUTS:
        looks, grown = len(replica.held()), replica.memory
        try:
            status, body = answer_to(port, one.raw)
        except TimeoutError:
            faults.append(f"{one.name}: no answer in {MOST_S} s")
            replica.process.kill()  # what holds it would count against the inputs that follow
            replica = start_replica()
            port = httpx.URL(replica.url).port
            continue
        if status not in one.status:
            faults.append(f"{one.name}: expected {one.status}, got {status} {body[:200]!r}")
        if status >= 400 and body.startswith(b"{") and not json.loads(body)["error"]["message"]:
            faults.append(f"{one.name}: an error without a message")
        if replica.memory > grown + MOST_BYTES:
            faults.append(f"{one.name}: {(replica.memory - grown) >> 20} MiB more")
        assert httpx.get(f"{replica.url}/livez", timeout=2 * MOST_S).status_code == 200, one.name
        wait_until(lambda replica=replica, looks=looks: len(replica.held()) > looks, 60)
        if (held := max(replica.held()[looks:])) >= HELD_S:
            faults.append(f"{one.name}: held the event loop for {held:.3f} s")
    print(
        f"\n{len(kinds.INPUTS)} inputs, {len(faults)} faults; held at most {max(replica.held()):.4f} s; "
        f"memory {memory >> 20} -> {replica.memory >> 20} MiB"
    )
    assert not faults, "\n".join(faults)
    sent = {"model": "tiny", "messages": kinds.MESSAGES}
    assert httpx.post(f"{replica.url}/v1/chat/completions", json=sent, timeout=60).status_code == 200
