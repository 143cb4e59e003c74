"""`candor deploy`: the server's settings on Ray Serve, on this machine or a cluster."""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Routing(StrEnum):
    prefix = "prefix"
    load = "load"


def deploy(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="For each model a file of settings, CANDOR_MODEL=... and so on, one a line. They go before the "
            "environment's; without a file, the environment alone.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, such as auto or ray://HOST:10001. Without it, Ray is started here.",
            envvar="RAY_ADDRESS",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Replicas of each model, at least.", min=1)] = 1,
    most_replicas: Annotated[
        int | None,
        typer.Option(help="At most, by what is in flight. Without it, the number is fixed.", min=1),
    ] = None,
    cpus: Annotated[
        float,
        typer.Option(help="Cores that Ray reserves for each process of a model; the CPU build uses as many."),
    ] = 1.0,
    gpus: Annotated[
        int, typer.Option(help="GPUs of each process of a model: 1, or 0 for the CPU build.")
    ] = 0,
    ingresses: Annotated[
        int | None,
        typer.Option(
            help="Processes that requests pass through, 2 by default where there are several replicas.", min=1
        ),
    ] = None,
    routing: Annotated[
        Routing,
        typer.Option(
            help="Who gets a request: whoever has seen what its prompt begins with, or the less busy."
        ),
    ] = Routing.prefix,
) -> None:
    """Answer over HTTP with several replicas, on Ray Serve. Settings are those of `candor serve`.

    Replicas of a machine or a cluster need one PostgreSQL store (CANDOR_STORE) to agree. Ends with Ctrl-C where it
    started Ray; on a cluster that was there, the application stays.
    """
    try:
        import ray
        from ray import serve

        from candor.app.process import cluster
    except ImportError as error:
        typer.echo(f"candor: it needs Ray Serve: install candor[ray] ({error})", err=True)
        raise typer.Exit(2) from None
    from dotenv import dotenv_values

    from candor.app.edge.keys import KeyFileError
    from candor.app.process.server import StartError, check_access
    from candor.app.store.records import StoreError
    from candor.engine.vllm_options import OptionError
    from candor.model_store.errors import BundleError

    own = cluster.from_environment()
    missing = [file for file in files or () if not file.is_file()]
    if missing:
        typer.echo(f"candor: expected files of settings; there is no {missing[0]}", err=True)
        raise typer.Exit(2)
    models = [own | {k: v for k, v in dotenv_values(file).items() if v} for file in files or ()] or [own]
    args: dict[str, Any] = {
        "models": models,
        "replicas": replicas,
        "most_replicas": most_replicas,
        "cpus": cpus,
        "gpus": gpus,
        "ingresses": ingresses,
        "routing": routing.value,
    }
    try:
        application = cluster.application(args)
        first = cluster.settings_of(models[0])
        check_access(first)
        require_shared(first.store, max(replicas, most_replicas or 1))
    except (BundleError, KeyFileError, OptionError, StartError, StoreError, ValueError) as error:
        typer.echo(f"candor: {error}", err=True)
        raise typer.Exit(2) from None

    # By default Ray's workers yield to whoever else is on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address=address, **({} if address else {"include_dashboard": False}))
    serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": first.host,
            "port": first.port,
            "request_timeout_s": None,
            "ssl_certfile": first.tls_certificate and str(first.tls_certificate),
            "ssl_keyfile": first.tls_key and str(first.tls_key),
        },
    )
    # It ends as Ctrl-C does: drained, Ray's processes too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.run(application, name="candor", route_prefix="/", blocking=address is None)


def require_shared(store: str | None, replicas: int) -> None:
    """Raises ValueError where several replicas would share nothing."""
    from candor.app.store.database import is_shared

    if replicas > 1 and not is_shared(store):
        raise ValueError(
            f"{replicas} replicas agree through a PostgreSQL store, and there is none: set CANDOR_STORE to its URL, "
            "postgresql://USER@HOST/NAME, and CANDOR_STORE_SPOOL to a file on each machine"
        )
