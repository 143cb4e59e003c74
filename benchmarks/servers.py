"""Starts servers for a benchmark, Candor and plain vLLM, and ends them afterwards with all their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Serving:
    """A running server. pid: of the process that serves HTTP, which leads its own session (Linux).

    start_s: seconds from the process's start until it was ready.
    """

    url: str
    pid: int
    start_s: float

    def files(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Resident bytes of the server and of its engine's processes."""
        pages = sum(int(fields[1]) for fields in self._read("statm").values())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def memory_by_process(self) -> dict[str, int]:
        """Bytes of each process's own, by what it is: `http`, or the engine's by their titles.

        Files that it maps do not count: the kernel takes them back and gives them again as it likes.
        """
        page, names = os.sysconf("SC_PAGE_SIZE"), self._read("cmdline")
        found: dict[str, int] = {}
        for pid, fields in self._read("statm").items():
            title = names.get(pid, ["?"])[0].split("\0")[0]
            name = "http" if pid == self.pid else title.rsplit("/", 1)[-1].removeprefix("VLLM::") or "?"
            found[name] = found.get(name, 0) + (int(fields[1]) - int(fields[2])) * page
        return found

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU used so far, by the process that serves HTTP and by the engine's processes together."""
        used = {"http": 0, "engine": 0}
        for pid, fields in self._read("stat").items():
            after_name = fields[next(i for i, field in enumerate(fields) if field.endswith(")")) + 1 :]
            used["http" if pid == self.pid else "engine"] += int(after_name[11]) + int(after_name[12])
        return {part: ticks / os.sysconf("SC_CLK_TCK") for part, ticks in used.items()}

    def _read(self, name: str) -> dict[int, list[str]]:
        """/proc/PID/name of each of the server's processes, split at white space."""
        found: dict[int, list[str]] = {}
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with suppress(ProcessLookupError, FileNotFoundError):  # the process ended meanwhile
                if os.getsid(pid) == self.pid:
                    found[pid] = Path(f"/proc/{pid}/{name}").read_text().split()
        return found


def bind_all_cores(ranks: int = 1) -> None:
    """Binds every vLLM started from here to all cores, shared out among its ranks; by default it leaves one core of a
    small machine idle."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    lists = (cores[rank * each % len(cores) :][:each] for rank in range(ranks))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, some)) for some in lists))


def half_of_the_cores(which: int) -> dict[str, str]:
    """Binds one of two vLLMs to the first (0) or second (1) half of the cores; by default both take the same one."""
    cores = sorted(os.sched_getaffinity(0))
    half = (cores[: (len(cores) + 1) // 2], cores[len(cores) // 2 :])[which]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, half))}


@contextmanager
def serving(
    model: Path, bundle: Path, settings: Mapping[str, str] | None = None, within_s: float = 900
) -> Iterator[Serving]:
    """Starts Candor. settings: CANDOR_ variables. Raises RuntimeError with the log's end if it does not start."""
    command = ["-c", "from candor.app.cli import main; main()", "serve"]
    command += ["--model", str(model), "--bundle", str(bundle)]
    with _started(command, "/readyz", within_s, settings or {}) as server:
        yield server


@contextmanager
def plain_vllm(
    model: Path, arguments: Sequence[str], within_s: float = 900, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """Starts vLLM's own OpenAI server. Raises RuntimeError with the log's end if it does not start."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *arguments]
    alone = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with _started(command, "/health", within_s, alone | dict(environment or {})) as server:
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str],
    ready: str,
    within_s: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program in that folder, waits until the URL `ready` answers, and ends it afterwards.

    Raises RuntimeError with the log's end if it does not start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else it would outlive the benchmark
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _await(process, ready, within_s)
            yield process
        except _NotStarted:
            log.seek(0)
            raise RuntimeError(log.read()[-2000:].decode(errors="replace")) from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _started(
    command: Sequence[str], ready: str, within_s: float, environment: Mapping[str, str]
) -> Iterator[Serving]:
    url, began = f"http://127.0.0.1:{(port := free_port())}", time.monotonic()
    whole = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
    with running(whole, url + ready, within_s, environment) as process:
        yield Serving(url, process.pid, time.monotonic() - began)


class _NotStarted(Exception):
    """A server ended, or was not ready in time."""


def _await(process: subprocess.Popen[bytes], url: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    with httpx.Client(timeout=30, verify=False) as client:  # one for all tries: each costs 50 ms of CPU
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get(url).is_success:
                    return
            time.sleep(0.2)
    raise _NotStarted
