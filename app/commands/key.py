"""`candor key`: makes an API key, prints it once and stores its hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in logs.")],
    file: Annotated[
        Path, typer.Option(help="Where its hash is added; give this file to `candor serve --keys`.")
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do, once or more: answer (ask), feedback (thumbs), review (read and label kept "
            "answers), operate (metrics, deep checks); answer by default."
        ),
    ] = None,
) -> None:
    """Make an API key. It is printed once, on standard output; the file keeps its hash alone."""
    from candor.app.edge.keys import KeyFileError, Scope, make_key, read_keys

    scopes: list[Scope] = scope or ["answer"]  # type: ignore[assignment]  # make_key refuses other values
    try:
        secret, made = make_key(name, scopes)
        if file.exists() and file.stat().st_size and any(other.name == name for other in read_keys(file)):
            raise KeyFileError(f"{file} has a key named {name} already; remove its line or take another name")
        _append(file, made.line())
    except (KeyFileError, OSError) as error:
        typer.echo(f"candor: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"candor: {name} may {', '.join(sorted(scopes))}; this is shown once:", err=True)
    typer.echo(secret)


def _append(file: Path, line: str) -> None:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(handle, "r+b", buffering=0) as keys:
        keys.seek(0)
        before = keys.read()
        # A file edited by hand may lack its last line feed.
        keys.write((b"" if before.endswith(b"\n") or not before else b"\n") + line.encode())
        os.fsync(handle)
