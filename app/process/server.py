"""The server process: it starts from settings, serves, and ends with an exit code.

    bind the port -> load and verify the bundle -> start the engine -> compare identities
                  -> ask the golden prompts -> serve

A failure before serving gives one readable message and exit code 1, and leaves nothing running. Keys and
certificate are checked first and the port is bound early, because such errors show at once. The server listens
only when it can answer. Without keys, it listens on a loopback address only, unless `open_to_all` is set.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from candor.app.edge.connections import KEEP_ALIVE_S
from candor.app.edge.keys import KeyFileError, read_keys
from candor.app.edge.limits import Refused
from candor.app.edge.quotas import QuotaFileError
from candor.app.process.application import create_app
from candor.app.process.backend import Backend, start_backend
from candor.app.process.ending import Leaving, ending_children
from candor.app.process.promoted import PromotedFileError
from candor.app.process.selftest import SelfTest
from candor.app.process.settings import LOOPBACK, Settings
from candor.app.store.records import StoreError
from candor.app.telemetry.audit import AuditFileError
from candor.app.telemetry.tracing import tracer_from_environment
from candor.engine.base import EngineError
from candor.model_store.errors import BundleError

logger = logging.getLogger("candor")

Start = Callable[[Settings], Awaitable[Backend]]

_GRACE_S = 30
"""Seconds, beyond the drain, in which a server with a dead engine may end by itself."""


_FORESEEN = (
    AuditFileError,
    BundleError,
    EngineError,
    KeyFileError,
    PromotedFileError,
    QuotaFileError,
    Refused,
    StoreError,
)


class StartError(Exception):
    """The server cannot start; the message says what to do."""


def run(settings: Settings, start: Start = start_backend) -> int:
    """Serves until a signal (SIGTERM, SIGINT) ends it or the engine dies.

    start: makes the backend. Returns the exit code: 0 after a signal, else 1.
    """
    try:
        # While uvicorn serves, it handles SIGTERM itself and lets running answers finish.
        with ending_children(0), asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            return runner.run(_serve(settings, start))
    except KeyboardInterrupt:
        return 0
    except (*_FORESEEN, StartError) as error:
        print(f"candor: {error}", file=sys.stderr)
        return 1


async def _serve(settings: Settings, start: Start) -> int:
    check_access(settings)
    with (
        _bind(settings.host, settings.port) as listener,
        tracer_from_environment() as tracer,
    ):
        backend = await start(settings)
        engine_died = False
        last_resort = threading.Timer(settings.drain_timeout_s + _GRACE_S, os._exit, [1])
        last_resort.daemon = True

        def end() -> None:
            nonlocal engine_died
            engine_died = server.should_exit = True
            last_resort.start()  # closing may hang if the engine is stuck

        try:
            for one in (backend, *backend.adapted):
                await prove(one, settings.engine_stall_timeout_s)
            leaving = Leaving()
            app = create_app(settings, backend, end, tracer, leaving)
        except BaseException:
            await backend.engine.close()
            raise
        name = settings.model_names(backend.bundle.manifest.name)[0]
        server = _Server(uvicorn_config(app, settings), name, leaving, settings.shutdown_delay_s)
        try:
            await server.serve(sockets=[listener])
        finally:
            last_resort.cancel()
        return 1 if engine_died else 0


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """app: from `create_app`."""
    return uvicorn.Config(
        app,
        http=app.state.connections.protocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_timeout_s,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )


def check_access(settings: Settings) -> None:
    """Checks keys, host and certificate. Raises StartError or KeyFileError."""
    if settings.keys is not None:
        names = ", ".join(key.name for key in read_keys(settings.keys))
        logger.info("keys of %s: whoever has none of them is refused", names)
    elif settings.host in LOOPBACK:
        logger.info("no API keys: listening on %s alone, whoever is on this machine may ask", settings.host)
    elif settings.open_to_all:
        logger.warning("no API keys: whoever reaches %s may ask", settings.host)
    else:
        raise StartError(
            f"without API keys this server listens on 127.0.0.1 alone, not on {settings.host}: make a key with "
            "`candor key NAME --file keys` and give the file with --keys (or set CANDOR_OPEN_TO_ALL=true where "
            "nobody but you reaches that address)"
        )
    if settings.tls_certificate is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_certificate, settings.tls_key, _no_passphrase)
        except OSError as error:  # also ssl.SSLError
            raise StartError(f"cannot use the certificate {settings.tls_certificate}: {error}") from error


def _no_passphrase() -> str:
    # Without this, OpenSSL asks at the terminal, where nobody is.
    raise StartError(
        "the TLS key has a passphrase, and nobody is there to type it: give CANDOR_TLS_KEY one without, made by "
        "`openssl pkey -in KEY -out NEW`, readable for this server alone"
    )


async def prove(backend: Backend, within_s: float) -> None:
    """Runs the golden prompts. Raises GoldenMismatch, EngineError, or StartError after `within_s` seconds."""
    check = asyncio.create_task(SelfTest(backend).check())
    await asyncio.wait({check}, timeout=within_s)
    if not check.done():
        check.cancel()
        raise StartError(
            f"the engine did not answer the golden prompts within {within_s:g} s; a slow one needs a larger "
            "CANDOR_ENGINE_STALL_TIMEOUT_S"
        )
    check.result()


class _Server(uvicorn.Server):
    """A uvicorn server that logs its address once it listens, and that leaves in two steps.

        SIGTERM -> `/readyz` fails, requests are still taken, connections are closed after their response
                -> `delay_s` later no more is taken; what runs is finished

    A second SIGTERM, or SIGINT, ends the first step.
    """

    def __init__(self, config: uvicorn.Config, model_name: str, leaving: Leaving, delay_s: float) -> None:
        super().__init__(config)
        self._model_name = model_name
        self._leaving = leaving
        self._delay_s = delay_s
        self._leaves_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and not self._leaving.begun and self._delay_s:
            self._captured_signals.append(sig)
            self._leaving.begun = True
            self._leaves_at = monotonic() + self._delay_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if monotonic() >= self._leaves_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.openapi()  # type: ignore[union-attr]  # kept; making it takes longer than a request may
        # What was loaded stays: the collector need not look at it again, which takes longer than a request may too.
        gc.collect()
        gc.freeze()
        try:
            await super().startup(sockets)
            # If listening fails, uvloop closes the socket without raising; getsockname then raises OSError.
            addresses = [listener.getsockname()[:2] for listener in sockets or ()]
        except OSError as error:
            await self.lifespan.shutdown()
            raise StartError(
                "cannot listen: somebody else does on the same port by now; choose another with --port"
            ) from error
        for host, port in addresses:
            protocol = "https" if self.config.is_ssl else "http"
            url = f"{protocol}://[{host}]:{port}" if ":" in host else f"{protocol}://{host}:{port}"
            logger.info("ready url=%s model=%s", url, self._model_name)


def _bind(host: str, port: int) -> socket.socket:
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error}; choose another address with --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":  # every address, of IPv4 too
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error}; choose another port with --port"
        ) from error
    return listener


def _fastest_loop() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop
