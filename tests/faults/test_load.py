"""One server, and clients that read slowly, come in crowds, hang up, mean no good, or ask while the clock jumps; then
it is told to end amid its work. The tests share the server and stand in order: the last one ends it.
"""

from __future__ import annotations

import asyncio
import runpy
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
FITS = 32
DELAY_S = 2
SET_FORWARD_S, SET_BACK_S = 400 * 86_400, -400 * 86_400


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A library that shifts the wall clock, and the file that says by how much."""
    folder = tmp_path_factory.mktemp("clock")
    compiler = shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = Path(__file__).with_name("clock.c")
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-o", library, source, "-ldl"], check=True)
    (folder / "offset").write_text("0")
    return library, folder / "offset"


@pytest.fixture(scope="module")
def server(start_server: Any, clock: tuple[Path, Path]) -> Any:
    library, offset = clock
    server = start_server(LD_PRELOAD=str(library), CANDOR_TEST_CLOCK=str(offset))
    server.answers()
    return server


async def many(count: int, one: Callable[[httpx.AsyncClient], Any]) -> list[Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=240) as client:
        return await asyncio.gather(*(one(client) for _ in range(count)), return_exceptions=True)


def test_a_client_that_reads_one_byte_a_second(server: Any, ask_body: Any) -> None:
    """Others are answered meanwhile. It keeps one place, until its deadline, and no longer."""
    payload = httpx.Request("POST", server.url, json=ask_body(stream=True)).content
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"x-request-timeout: 20\r\ncontent-length: {len(payload)}\r\n\r\n"
        slow.sendall(head.encode() + payload)
        began = time.monotonic()
        for _ in range(5):
            assert len(slow.recv(1)) == 1
            assert server.load() <= 1
            server.answers()
            time.sleep(1)
        server.settles()  # its answer is finished, or given up at the deadline: it waits for nobody
        assert time.monotonic() - began < 60
    server.answers()


def test_a_crowd_where_few_fit(server: Any, ask_body: Any) -> None:
    """500 at once where 32 fit: each is answered and judged, or told to come back; memory and files return."""
    server.settles()
    files, memory = server.files(), server.memory()

    async def one(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(f"{server.url}/v1/chat/completions", json=ask_body())

    responses = asyncio.run(many(500, one))
    assert not [one for one in responses if isinstance(one, BaseException)]
    statuses = Counter(response.status_code for response in responses)
    print(f"\ncrowd of 500: {dict(statuses)}")
    assert set(statuses) <= {200, 503}
    assert statuses[200] >= FITS
    for response in responses:
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
        else:
            assert response.json()["reliability"]["results"][0]["region"] == "high"
    server.settles()
    server.answers()
    print(f"files {files} -> {server.files()}, memory {memory >> 20} -> {server.memory() >> 20} MiB")
    assert server.files() <= files + 5
    assert server.memory() < memory + (200 << 20)


def test_a_thousand_that_hang_up(server: Any, ask_body: Any) -> None:
    """Half of them before the first token, half amid the stream: no place stays taken, here or in vLLM."""
    server.settles()
    files, memory = server.files(), server.memory()
    gate = asyncio.Semaphore(100)  # the crowd is another test: here they get in, and leave
    seen: Counter[str] = Counter()

    async def one(client: httpx.AsyncClient) -> None:
        async with gate:
            early = sum(seen.values()) % 2
            try:
                async with client.stream(
                    "POST",
                    f"{server.url}/v1/chat/completions",
                    json=ask_body(stream=True, max_tokens=200, temperature=1.0),
                    timeout=0.05 if early else 240,
                ) as response:
                    seen[str(response.status_code)] += 1
                    async for _ in response.aiter_bytes():
                        return
            except httpx.TimeoutException:
                seen["left before the first token"] += 1

    failures = [one for one in asyncio.run(many(1000, one)) if one is not None]
    print(f"\nhung up: {dict(seen)}")
    assert not failures
    assert sum(seen.values()) == 1000
    assert set(seen) <= {"200", "503", "left before the first token"}
    assert seen["200"] > 50
    assert seen["left before the first token"] > 50
    server.settles()
    server.answers()
    print(f"files {files} -> {server.files()}, memory {memory >> 20} -> {server.memory() >> 20} MiB")
    assert server.files() <= files + 5
    assert server.memory() < memory + (200 << 20)


def test_a_clock_that_jumps(server: Any, ask_body: Any, clock: tuple[Path, Path]) -> None:
    """Over a year ahead and back, amid answers: none is given up, none is judged otherwise, feedback is kept."""
    _, offset = clock
    given = server.ask().json()
    jumps = [SET_FORWARD_S, SET_BACK_S, 0, SET_FORWARD_S, 0]
    stop = threading.Event()

    def jump() -> None:
        for seconds in jumps * 20:
            offset.write_text(str(seconds))
            if stop.wait(0.3):
                break
        offset.write_text("0")

    jumping = threading.Thread(target=jump)
    jumping.start()
    try:
        created = set()
        for _ in range(12):
            response = server.ask()
            assert response.status_code == 200
            assert response.json()["reliability"]["results"][0]["region"] == "high"
            assert response.json()["choices"] == given["choices"]
            created.add(response.json()["created"] // (100 * 86_400))
        told = httpx.post(
            f"{server.url}/v1/reliability/feedback", json={"id": given["id"], "correct": True}, timeout=30
        )
        assert told.json()["region"] == "high"
    finally:
        stop.set()
        jumping.join()
    assert len(created) > 1, "the clock did not jump"
    assert httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200
    server.answers()


AS_VLLM = (": a number as text", ": true", "min_p: a fraction", "top_k: a huge number", "seed: 1e-400")
"""What vLLM's schema takes: more fields than ours has, numbers as text, no upper bound."""


def test_the_corpus_of_hostile_requests(server: Any, ask_body: Any) -> None:
    """tests/app/hostile.py: each wrong request gets its error, and no text talks itself into the region `high`."""
    corpus = runpy.run_path(str(ROOT / "tests/app/hostile.py"))
    attacks = [*corpus["BROKEN"], *corpus["WRONG"]]
    faults = []
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for attack in attacks:
            content = attack.body.replace(b'"tiny"', b'"word-ordering"')
            response = client.post(attack.path, content=content, headers={"content-type": "application/json"})
            if response.status_code == 200 and attack.name.endswith(AS_VLLM):
                continue
            found = (response.status_code, response.json().get("error", {}).get("code"))
            if found[0] != attack.status or found[1] not in (*attack.codes, "unknown_parameter"):
                faults.append(f"{attack.name}: expected {attack.status} {attack.codes}, got {found}")
        regions: Counter[str] = Counter()
        for text in corpus["TEXTS"]:
            response = client.post("/v1/chat/completions", json=ask_body(text))
            assert response.status_code == 200, text
            [verdict] = response.json()["reliability"]["results"]
            regions[verdict["region"]] += 1
            if verdict["region"] == "high":
                faults.append(f"judged reliable: {text!a}")
    print(f"\n{len(attacks)} wrong requests; {len(corpus['TEXTS'])} hostile texts: {dict(regions)}")
    assert not faults, "\n".join(faults)
    server.answers()


def test_the_golden_prompts_still_hold(server: Any) -> None:
    """After all of that the engine gives the states that were calibrated."""
    deep = httpx.get(f"{server.url}/readyz", params={"deep": "true"}, timeout=120)
    assert deep.json() == {"status": "ok"}


def test_sigterm_under_load(server: Any, ask_body: Any, terminate: Any, wait_until: Any) -> None:
    """Streams that run are finished, new work is refused, all feedback that was acknowledged is there, code 0."""
    acknowledged: list[str] = []
    ended: list[str] = []
    running = threading.Semaphore(0)

    def stream() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=ask_body(stream=True), timeout=120
        ) as response:
            lines = response.iter_lines()
            first = next(lines)
            running.release()
            ended.append([first, *(line for line in lines if line)][-1])

    def tell() -> None:
        with httpx.Client(timeout=30) as client:
            for _ in range(200):
                try:
                    given = client.post(
                        f"{server.url}/v1/chat/completions", json=ask_body(max_tokens=2)
                    ).json()
                    told = client.post(
                        f"{server.url}/v1/reliability/feedback", json={"id": given["id"], "correct": False}
                    )
                except (httpx.HTTPError, KeyError):
                    return
                if told.status_code == 200:
                    acknowledged.append(given["id"])

    threads = [threading.Thread(target=tell), *(threading.Thread(target=stream) for _ in range(12))]
    threads[0].start()
    wait_until(lambda: len(acknowledged) >= 2, 120)
    for thread in threads[1:]:
        thread.start()
    for _ in range(12):
        assert running.acquire(timeout=60)
    terminate(server)
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=30).status_code == 503, 5)
    assert httpx.get(f"{server.url}/livez", timeout=5).status_code == 200  # it listens on
    time.sleep(DELAY_S + 1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/livez", timeout=5)
    assert server.process.wait(timeout=90) == 0
    for thread in threads:
        thread.join(30)
    assert ended == ["data: [DONE]"] * 12
    with sqlite3.connect(server.feedback) as file:
        kept = {row for (row,) in file.execute("SELECT id FROM thumbs")}
    file.close()
    assert set(acknowledged) <= kept
    assert not server.processes()
