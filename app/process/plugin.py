"""Candor inside of `vllm serve`: its routes, and vLLM's with verdicts, in place of vLLM's own.

    VLLM_PLUGINS=candor CANDOR_BUNDLE=BUNDLE vllm serve MODEL        vLLM's options, and CANDOR_ variables

vLLM loads `Plugin` by the entry point `vllm.endpoint_plugins`. It hands each request of a route of ours to the same
application that `candor serve` runs, which has the keys, the limits and the errors. Connections, TLS and `/metrics`
stay vLLM's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from candor.app.process.application import ROUTES, create_app
from candor.app.process.backend import start_backend
from candor.app.process.server import prove
from candor.app.process.settings import Settings

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

_OUTER = (
    "app",
    "router",
    "route",
    "endpoint",
    "path_params",
    "fastapi_inner_astack",
    "fastapi_function_astack",
)
"""What vLLM's application has written into a request's scope about itself."""


class Plugin:
    """See `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "candor"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._state: Mapping[str, Any] = {}
        self._open = AsyncExitStack()

    def attach_router(self, app: FastAPI) -> None:
        for module in ROUTES:
            for route in module.router.routes:
                self._attach(app, route)
        lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def with_ours(outer: FastAPI) -> AsyncIterator[Any]:
            async with self._open, lifespan(outer) as state:
                yield state

        app.router.lifespan_context = with_ours

    def _attach(self, app: FastAPI, route: APIRoute) -> None:
        app.add_api_route(route.path, self._forward, methods=sorted(route.methods), include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Raises what `candor serve` raises where it does not start."""
        from candor.engine.vllm_plugin import engine_over, options

        told: dict[str, Any] = {
            "model": args.model,
            "max_model_len": engine_client.model_config.max_model_len,
        }
        if args.served_model_name:
            told["served_model_name"] = ",".join(args.served_model_name)
        settings = Settings(**told)
        start = partial(engine_over, engine_client, args)
        backend = await start_backend(settings, vllm=options(args), start=start)
        await prove(backend, settings.engine_stall_timeout_s)
        self._app = create_app(settings, backend)
        lifespan: Any = self._app.router.lifespan_context(self._app)
        self._state = await self._open.enter_async_context(lifespan)

    async def _forward(self, request: Request) -> Response:
        assert self._app is not None  # vLLM has initialised its state before it listens
        return _Inner(self._app, self._state)


class _Inner(Response):
    """Whatever our application responds."""

    def __init__(self, app: FastAPI, state: Mapping[str, Any]) -> None:
        self._app, self._inner_state = app, state
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = {name: value for name, value in scope.items() if name not in _OUTER}
        await self._app(inner | {"state": dict(self._inner_state)}, receive, send)
