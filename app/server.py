"""From settings to a running server, and from its end to an exit code.

    bind the port -> load and verify the bundle -> start the engine -> compare identities -> serve

Whatever fails before serving is one readable message and code 1, and nothing is left running. The port is
bound first, for that is known at once, but only listened on when answers can be given.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import NoReturn

import uvicorn

from app.admission import Refused
from app.backend import Backend, start_backend
from app.main import create_app
from app.settings import Settings
from engine.base import EngineError
from model_store.errors import BundleError

logger = logging.getLogger("candor")

Start = Callable[[Settings], Awaitable[Backend]]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class StartError(Exception):
    """The server cannot start; the message says what to do."""


def run(settings: Settings, start: Start = start_backend) -> int:
    """Serves until told to end (SIGTERM, SIGINT) or until the engine dies.

    start: makes what answers. Returns the exit code: 0 where it was told to end, else 1.
    """
    # As an exception, so that whatever is being started is also ended.
    signal.signal(signal.SIGTERM, _end)
    try:
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            return runner.run(_serve(settings, start))
    except KeyboardInterrupt:
        return 0
    except (BundleError, EngineError, Refused, StartError) as error:
        print(f"candor: {error}", file=sys.stderr)
        return 1


async def _serve(settings: Settings, start: Start) -> int:
    with _bind(settings.host, settings.port) as listener:
        backend = await start(settings)
        engine_died = False

        def end() -> None:
            nonlocal engine_died
            engine_died = server.should_exit = True

        try:
            app = create_app(settings, backend, on_engine_death=end)
        except Refused:
            await backend.engine.close()
            raise
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_timeout_s,
        )
        server = _Server(config, settings.served_model_name or backend.bundle.manifest.name)
        await server.serve(sockets=[listener])
        return 1 if engine_died else 0


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, model_name: str) -> None:
        super().__init__(config)
        self._model_name = model_name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            logger.info("ready url=%s model=%s", url, self._model_name)
            if host not in _LOOPBACK:
                logger.warning("there are no API keys: whoever reaches %s can ask", host)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error}; choose another address with --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error}; choose another port with --port"
        ) from error
    return listener


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _fastest_loop() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop
