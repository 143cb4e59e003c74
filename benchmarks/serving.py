"""A server of its own for a benchmark: `candor serve` in a process, ended afterwards with everything it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Serving:
    """A server that answers. pid: of the process that serves HTTP, which leads a session of its own (Linux)."""

    url: str
    pid: int

    def files(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Resident bytes of it and of its engine's processes."""
        pages = 0
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(ProcessLookupError, FileNotFoundError):  # ended meanwhile
                if os.getsid(int(name)) == self.pid:
                    pages += int(Path(f"/proc/{name}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(model: Path, bundle: Path, within_s: float = 900, **settings: str) -> Iterator[Serving]:
    """settings: CANDOR_ variables. Raises RuntimeError with the log's end where it does not start."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the server would outlive a benchmark
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
    command += ["--model", str(model), "--bundle", str(bundle), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _await(process, url, within_s)
            yield Serving(url, process.pid)
        except RuntimeError:
            log.seek(0)
            raise RuntimeError(log.read()[-2000:].decode(errors="replace")) from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _await(process: subprocess.Popen[bytes], url: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=30).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start")
