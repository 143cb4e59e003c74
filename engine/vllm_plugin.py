"""Candor inside of `vllm serve`, the engine's half: it takes hidden states where VLLM_PLUGINS names candor.

vLLM loads `register` in each of its processes (entry point `vllm.general_plugins`). The half with the routes is
`app.process.plugin`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import MISSING, fields
from typing import Any

import vllm.envs as envs

from candor.engine.base import EngineError
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.engine.vllm_options import of_server

NAME = "candor"


def register() -> None:
    """Has vLLM start its workers and its scheduler as Candor's, which take the states."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if NAME not in (envs.VLLM_PLUGINS or ()) or hasattr(create, NAME):
        return

    def created(self: Any, *args: Any, **kwargs: Any) -> Any:
        from candor.engine.vllm_engine import capturing, worker_class

        self.worker_cls = worker_class()
        return capturing(create(self, *args, **kwargs))

    setattr(created, NAME, True)
    EngineArgs.create_engine_config = created


def options(args: Namespace) -> dict[str, Any]:
    """Returns the options of vLLM's engine that `vllm serve` was given. Raises OptionError."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(AsyncEngineArgs)
    }
    return of_server(vars(args), defaults)


async def engine_over(client: Any, args: Namespace, settings: EngineSettings, chat: ChatFormat) -> Any:
    """Returns an engine over vLLM's `EngineClient`. Raises EngineError if it takes no states or is several."""
    from candor.engine.vllm_engine import VLLMEngine

    config = client.vllm_config
    if not str(config.parallel_config.worker_cls).startswith("candor."):
        raise EngineError(
            "this vLLM takes no hidden states: leave out --worker-cls, and name candor in VLLM_PLUGINS"
        )
    if str(config.model_config.dtype) != f"torch.{settings.dtype}":
        raise EngineError(
            f"the bundle was made in {settings.dtype}; start vLLM with --dtype {settings.dtype}"
        )
    if getattr(args, "api_server_count", 1) not in (None, 1):
        raise EngineError("several API servers would each judge for themselves; use --api-server-count 1")
    return VLLMEngine.over(client, args, settings, chat)
