"""The command `candor`. Each command's module imports what is heavy only when the command runs."""

from __future__ import annotations

import typer

from app.commands.bundle import bundle_app
from app.commands.calibrate import calibrate, evaluate
from app.commands.serve import serve

cli = typer.Typer(
    name="candor",
    help="An inference server that says when it does not know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.command()(serve)
cli.command()(calibrate)
cli.command()(evaluate)
cli.add_typer(bundle_app, name="bundle")


def main() -> None:
    """The console entry."""
    cli()
