"""The image's health check, against real sockets: HTTP and HTTPS, ready or not, listening or not."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest


@contextmanager
def serving(status: int, certificate: Path | None = None) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def check(root: Path, port: int, **settings: str) -> int:
    """Its exit code, run as in the image."""
    environment = {"PATH": os.environ["PATH"], "CANDOR_PORT": str(port), "CANDOR_HOST": "::", **settings}
    command = [sys.executable, "-S", "docker/healthcheck.py"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_http(root: Path, status: int, code: int) -> None:
    for host in ("::", "0.0.0.0", "127.0.0.1"):
        with serving(status) as port:
            assert check(root, port, CANDOR_HOST=host) == code


def test_https(root: Path, tmp_path: Path) -> None:
    """The certificate names the service and not this machine, and is no reason to be unhealthy."""
    files = [tmp_path / "key", tmp_path / "certificate"]
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=candor.example"
    subprocess.run([*made.split(), "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    both = tmp_path / "both"
    both.write_bytes(b"".join(file.read_bytes() for file in files))
    with serving(200, both) as port:
        assert check(root, port, CANDOR_TLS_CERTIFICATE="/tls/tls.crt") == 0
        assert check(root, port) == 1


def test_nobody_listens(root: Path) -> None:
    assert check(root, 9) == 1
