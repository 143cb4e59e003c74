"""`candor serve`: starts the server. Settings without an option here are set by environment variables."""

from __future__ import annotations

import os
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer


class EngineKind(StrEnum):
    vllm = "vllm"
    transformers = "transformers"


def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Directory of the model. [CANDOR_MODEL]")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Directory of the bundle made for it. [CANDOR_BUNDLE]")
    ] = None,
    shadow: Annotated[
        Path | None,
        typer.Option(help="Directory of a second bundle that scores each answer too, and decides nothing."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 8000 by default.")] = None,
    engine: Annotated[EngineKind | None, typer.Option(help="What generates, vllm by default.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Names that requests may give as model: A,B.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys' hashes, see `candor key`. Without it, only this machine."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Accuracy asked for where a request names none.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA adapter and the bundle made with it, DIR=BUNDLE. May be repeated.",
            envvar="CANDOR_ADAPTERS",
        ),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="No compilation: starts sooner, answers more slowly.")
    ] = False,
) -> None:
    """Answer over HTTP, each answer with its calibrated reliability.

    Every setting is also an environment variable, CANDOR_ and its name; an option goes before it. Each adapter is
    served beside the model, under its bundle's name. vLLM's options are taken by their own names, also from
    CANDOR_VLLM and from a YAML file, --config FILE (docs/settings.md).
    """
    from pydantic import ValidationError

    from candor.app.process.settings import Settings

    if os.environ.get("CANDOR_FEEDBACK"):
        typer.echo(
            "candor: CANDOR_FEEDBACK is no longer read: give CANDOR_STORE a new file, and take the old one over with "
            "`candor store import`",
            err=True,
        )
        raise typer.Exit(2)
    given: dict[str, Any] = {
        "model": model,
        "bundle": bundle,
        "shadow": shadow,
        "host": host,
        "port": port,
        "engine": engine and engine.value,
        "served_model_name": served_model_name,
        "max_model_len": max_model_len,
        "keys": keys,
        "alpha": alpha,
        "eager": eager or None,
    }
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            typer.echo(f"candor: {_where(name)}{fault['msg']}", err=True)
        raise typer.Exit(2) from None

    vllm = vllm_options(context, settings.engine)

    from candor.app.telemetry import logs

    logs.configure(settings.log_format)
    from candor.app.process.backend import (
        start_backend,  # imports torch, so only after the settings were checked
    )
    from candor.app.process.server import run

    raise typer.Exit(
        run(settings, partial(start_backend, adapters=list(map(_pair, adapter or ())), vllm=vllm))
    )


def vllm_options(context: typer.Context, engine: str) -> dict[str, Any]:
    """Returns the options meant for vLLM. Prints one line and exits with code 2 if an option is invalid."""
    from candor.engine.vllm_options import VARIABLE, OptionError, read

    if not context.args and not os.environ.get(VARIABLE):
        return {}
    try:
        return read(context.args, engine)
    except OptionError as error:
        typer.echo(f"candor: {error}", err=True)
        raise typer.Exit(2) from None


def _pair(given: str) -> tuple[Path, Path]:
    adapter, _, bundle = given.partition("=")
    if not (adapter and bundle):
        raise typer.BadParameter(f"expected DIR=BUNDLE, got {given!r}", param_hint="--adapter")
    return Path(adapter), Path(bundle)


def _where(name: str) -> str:
    return f"--{name.replace('_', '-')} or CANDOR_{name.upper()}: " if name else ""
