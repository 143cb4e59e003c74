"""A real server on a real vLLM, to be broken. Run by hand: pytest -m faults tests/faults.

`start_server` serves the demo's model; `start_tiny` one with random weights, where what is answered does not matter.

Each test states what must hold and checks it; after each the server must answer the next request.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.zoo.calibrated import calibrated

# Told to end, pytest would leave the servers behind: as for Ctrl-C, fixtures are ended first.
signal.signal(signal.SIGTERM, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
CANDOR = (sys.executable, "-m", "candor.app.cli")
ORDERED = (
    "Finish the sentence with the words in the right order.\n"
    "Sentence: The children ran home before the\nWords: began. storm"
)
FITS = 32
"""Answers that this server lets in at once."""


def body(text: str = ORDERED, **more: Any) -> dict[str, Any]:
    return {"model": "word-ordering", "messages": [{"role": "user", "content": text}], **more}


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    feedback: Path

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body(**more), timeout=120)

    def answers(self) -> None:
        """The next request is answered, and judged as before everything."""
        response = self.ask()
        assert response.status_code == 200, response.text
        assert response.json()["reliability"]["results"][0]["region"] == "high"

    def load(self) -> int:
        return int(httpx.get(f"{self.url}/load", timeout=30).json()["server_load"])

    def running(self) -> float:
        """Requests that vLLM itself works on or has waiting."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))

    def processes(self) -> list[psutil.Process]:
        """Of the server's session: itself and its engine."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def engines(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "EngineCore" in " ".join(process.cmdline())]

    def files(self) -> int:
        """Open files and sockets of the process that serves HTTP."""
        return psutil.Process(self.process.pid).num_fds()

    def memory(self) -> int:
        """Bytes of the process that serves HTTP."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def settles(self) -> None:
        """Nothing is being answered any more, here or in vLLM."""
        until(lambda: self.load() == 0 and self.running() == 0, 60)


def until(holds: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def start(model: Path, bundle: Path, folder: Path, group: Path | None = None, **environment: str) -> Server:
    """group: directory of the cgroup that it starts in. environment: its settings."""
    with socket.create_server(("127.0.0.1", int(environment.pop("CANDOR_PORT", "0")))) as probe:
        port = probe.getsockname()[1]
    within = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)) if group else ()
    log = folder / "log"
    settings = {
        "CANDOR_EAGER": "true",
        "CANDOR_KV_CACHE_BYTES": str(1 << 28),
        "CANDOR_MAX_MODEL_LEN": "1024",
        "CANDOR_MAX_NUM_SEQS": "16",
        "CANDOR_MAX_IN_FLIGHT": str(FITS),
        "CANDOR_STORE": str(folder / "feedback.db"),
        "CANDOR_DRAIN_TIMEOUT_S": "60",
        "CANDOR_SHUTDOWN_DELAY_S": "2",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*within, *CANDOR, "serve", "--model", model, "--bundle", bundle, "--port", str(port)],
            env=os.environ | settings | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log, folder / "feedback.db")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{server.url}/readyz", timeout=30).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.5)
        else:
            return server
    end(server)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def end(server: Server) -> None:
    for process in server.processes():
        process.kill()
    server.process.wait(timeout=60)


@pytest.fixture(scope="module")
def start_server(
    demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Starts servers that are ended with the module."""
    yield from _starting(demo_model, ROOT / "demo/bundle", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny model and its bundle."""
    return calibrated(Path(os.environ.get("CANDOR_TINY", tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def start_tiny(
    tiny_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """As `start_server`, with a tiny model."""
    yield from _starting(*tiny_model, tmp_path_factory)


def _starting(model: Path, bundle: Path, folders: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def one(group: Path | None = None, **environment: str) -> Server:
        started.append(start(model, bundle, folders.mktemp("server"), group, **environment))
        return started[-1]

    yield one
    for server in started:
        end(server)


@pytest.fixture
def ask_body() -> Callable[..., dict[str, Any]]:
    return body


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], float], None]:
    return until


@pytest.fixture
def terminate() -> Callable[[Server], None]:
    return lambda server: os.kill(server.process.pid, signal.SIGTERM)
