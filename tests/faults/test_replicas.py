"""Real vLLM with a tiny model: replicas that follow each other, killed processes, no memory left, a full disk."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.faults

APP = Path(__file__).resolve().parents[1] / "app"
PROMPT = {"messages": [{"role": "user", "content": "Item 7."}]}
CGROUP = Path("/sys/fs/cgroup/memory")


def ask(url: str, timeout: float = 60, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=PROMPT | {"model": "bundle"} | more, timeout=timeout)


@contextmanager
def asking(next_url: Callable[[], str], clients: int = 4) -> Iterator[Counter[str]]:
    """Clients that ask one after the other, half of them streams, half on connections that they keep."""
    outcomes: Counter[str] = Counter()
    end = threading.Event()

    def one(stream: bool, keep: bool) -> None:
        client = httpx.Client(timeout=60)
        while not end.is_set():
            body = PROMPT | {"model": "bundle", "stream": stream, "max_tokens": 12}
            try:
                response = client.post(f"{next_url()}/v1/chat/completions", json=body)
                whole = not stream or response.text.endswith("data: [DONE]\n\n")
                outcomes[str(response.status_code) if whole else f"cut: {response.text[-200:]}"] += 1
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1
            if not keep:
                client.close()
                client = httpx.Client(timeout=60)
            time.sleep(0.05)
        client.close()

    threads = [
        threading.Thread(target=one, args=(number % 2 == 0, number % 4 < 2)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        end.set()
        for thread in threads:
            thread.join(90)


@pytest.fixture(scope="module")
def replicas(start_tiny: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda _: start_tiny(), range(2)))


def test_no_request_fails_in_a_rolling_update(replicas: list[Any], start_tiny: Any, wait_until: Any) -> None:
    """Two replicas under load, ended and started again one after the other, behind what a Service does."""
    balancer = runpy.run_path(str(APP / "test_rolling.py"))["Balancer"]([port_of(one) for one in replicas])
    wait_until(lambda: all(balancer.ready.values()), 60)
    took = []
    try:
        with asking(lambda: f"http://127.0.0.1:{balancer.next()}", clients=8) as outcomes:
            for number, server in enumerate(replicas):
                asked = outcomes.total()
                wait_until(lambda asked=asked: outcomes.total() > asked + 40, 120)
                told = time.monotonic()
                os.kill(server.process.pid, signal.SIGTERM)
                assert server.process.wait(90) == 0
                took.append(time.monotonic() - told)
                port = port_of(server)
                replicas[number] = start_tiny(CANDOR_PORT=str(port))
                wait_until(lambda port=port: balancer.ready[port], 60)
                asked = outcomes.total()
                wait_until(lambda asked=asked: outcomes.total() > asked + 40, 120)
    finally:
        balancer.close()
    print(f"\n{dict(outcomes)}; from SIGTERM to the end: {[round(one, 1) for one in took]} s")
    assert set(outcomes) == {"200"}
    assert outcomes["200"] > 100


def port_of(server: Any) -> int:
    return int(server.url.rsplit(":", 1)[1])


@pytest.mark.parametrize(("number", "which"), [(0, "Worker"), (1, "serve")])
def test_kill_9_of_each_process(replicas: list[Any], wait_until: Any, number: int, which: str) -> None:
    """As test_engine.py for the engine's own: whoever waits is told, and no process stays behind."""
    server = replicas[number]
    assert ask(server.url).status_code == 200
    [victim] = [one for one in server.processes() if which in " ".join(one.cmdline())]
    with asking(lambda: server.url) as outcomes:
        wait_until(lambda: outcomes["200"] > 10, 60)
        killed = time.monotonic()
        victim.kill()
        code = server.process.wait(timeout=60)
        wait_until(lambda: not server.processes(), 60)
        ended = time.monotonic() - killed
    print(f"\nkill -9 of {which}: exit code {code}, all ended after {ended:.1f} s; {dict(outcomes)}")
    assert code == (-9 if which == "serve" else 1)
    for outcome in outcomes:
        told = outcome in ("200", "503") or "engine_dead" in outcome
        assert told or "ConnectError" in outcome or "RemoteProtocolError" in outcome or "ReadError" in outcome


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup (version 1) of its own."""
    made = CGROUP / f"candor-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup of its own to be had here: {error}")
    yield made
    for pid in (made / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while made.is_dir() and time.monotonic() < deadline:
        with suppress(OSError):
            made.rmdir()
        time.sleep(0.2)


def figure(group: Path, name: str) -> int:
    return int((group / f"memory.{name}").read_text())


def killed(group: Path) -> int:
    return int((group / "memory.oom_control").read_text().split()[-1])


def test_memory_that_is_limited(start_tiny: Any, group: Path, wait_until: Any) -> None:
    """With 160 MiB more than it uses: bodies of a megabyte kill nothing. With nothing left: all of it ends."""
    server = start_tiny(group)
    ask(server.url)
    limit = figure(group, "usage_in_bytes") + (160 << 20)
    (group / "memory.limit_in_bytes").write_text(str(limit))
    bodies = runpy.run_path(str(APP / "hostile.py"))["HEAVY"][::4]
    for attack in bodies:
        body = attack.body.replace(b'"tiny"', b'"bundle"')
        headers = {"content-type": "application/json"}
        found = httpx.post(f"{server.url}{attack.path}", content=body, headers=headers, timeout=60)
        assert found.status_code < 500, (attack.name, found.text)
    most = figure(group, "max_usage_in_bytes")
    print(f"\n{len(bodies)} bodies; limit {limit >> 20} MiB, most {most >> 20} MiB, killed {killed(group)}")
    assert killed(group) == 0
    assert ask(server.url).status_code == 200

    hog = (  # the kernel may not choose it
        "import os,time\nopen('/proc/self/oom_score_adj','w').write('-1000')\n"
        f"open('{group}/cgroup.procs','w').write(str(os.getpid()))\nheld=[]\n"
        "while True:\n held.append(bytearray(os.urandom(4096)*4096)); time.sleep(0.02)"
    )
    with asking(lambda: server.url) as outcomes:
        wait_until(lambda: outcomes["200"] > 10, 60)
        began = time.monotonic()
        other = subprocess.Popen([sys.executable, "-c", hog])
        try:
            wait_until(lambda: killed(group) > 0, 90)
            told = time.monotonic()
            code = server.process.wait(timeout=90)
            wait_until(lambda: not server.processes(), 60)
        finally:
            other.kill()
            other.wait()
    print(
        f"out of memory after {told - began:.1f} s: exit code {code}, all ended "
        f"{time.monotonic() - told:.1f} s later; {dict(outcomes)}"
    )
    assert code != 0
    assert all(one in ("200", "503") or "Error" in one or "engine_dead" in one for one in outcomes)


def test_a_full_disk_while_it_serves(start_tiny: Any, tmp_path: Path) -> None:
    """Answers go on; what feedback is acknowledged is kept, and the rest is refused, until there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system of its own to be had here: {error}")
    try:
        kept = disk / "store.db"
        server = start_tiny(
            CANDOR_STORE=str(kept),
            CANDOR_AUDIT_LOG=str(disk / "audit"),
            CANDOR_QUOTAS=str(disk / "quotas.db"),
        )
        told: list[str] = []

        def feedback() -> int:
            given = ask(server.url)
            assert given.status_code == 200, given.text
            body = {"id": given.json()["id"], "correct": True}
            found = httpx.post(f"{server.url}/v1/reliability/feedback", json=body, timeout=60)
            if found.status_code == 200:
                told.append(body["id"])
            return found.status_code

        assert feedback() == 200
        with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(b"x" * 4096)
        statuses = Counter(feedback() for _ in range(30))
        print(f"\non a full disk: 30 answers, feedback {dict(statuses)}")
        assert set(statuses) <= {200, 404, 503}
        assert statuses[503] + statuses[404] > 0
        (disk / "ballast").unlink()
        deadline = time.monotonic() + 60
        while (last := feedback()) != 200:
            assert time.monotonic() < deadline, last
            time.sleep(1)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        with sqlite3.connect(kept) as file:
            rows = {row for (row,) in file.execute("SELECT id FROM thumbs")}
        file.close()
        spooled = "".join(one.read_text() for one in disk.glob("store.db*spool*") if one.is_file())
        assert all(one in rows or one in spooled for one in told)
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(disk) in file.path for file in process.open_files()):
                    process.kill()
        subprocess.run(["umount", "--lazy", disk], check=False)
        shutil.rmtree(disk, ignore_errors=True)
