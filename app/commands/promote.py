"""`candor promote` and `candor rollback`: change the bundle of a running server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from candor.app.clients.remote import Url, client_settings, explanation

Model = Annotated[str | None, typer.Option(help="Served model, by default the first.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def promote(
    bundle: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="Path on the server, name or first digits of the digest of a bundle that lies beside the configured "
            "one. By default the bundle that shadows.",
            show_default=False,
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    model: Model = None,
) -> None:
    """Have another bundle answer, without a restart. The key needs the scope `operate`.

    The server first checks that the bundle was made for its model and policy, promises at least what the present one
    does, and that the golden prompts give its states. Exit code 1 if it refuses; then nothing has changed.
    """
    _change(url, "/bundles/promote", {"model": model, "bundle": bundle})


def rollback(url: Url = DEFAULT_URL, model: Model = None) -> None:
    """Have the bundle answer again that did before the last promotion. The key needs the scope `operate`."""
    _change(url, "/bundles/rollback", {"model": model})


def _change(url: str, path: str, body: dict[str, Any]) -> None:
    import httpx

    try:
        with httpx.Client(**client_settings(url)) as client:
            response = client.post(path, json=body)
    except httpx.HTTPError as error:
        typer.echo(f"candor: no answer from {url}: {error}", err=True)
        raise typer.Exit(1) from None
    if response.status_code != 200:
        typer.echo(f"candor: {explanation(response)}", err=True)
        raise typer.Exit(1)
    now = response.json()
    before = f"; `candor rollback` goes back to {now['previous'][:12]}" if now["previous"] else ""
    typer.echo(f"{now['model']} answers by {now['bundle']}{before}")
