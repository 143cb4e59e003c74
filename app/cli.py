"""The command `candor`. Modules of commands import heavy packages only when the command runs."""

from __future__ import annotations

import gc

import typer

from candor.app.clients.batch import batch
from candor.app.clients.chat import chat
from candor.app.commands.audit import audit_app
from candor.app.commands.bundle import bundle_app
from candor.app.commands.calibrate import calibrate
from candor.app.commands.data import data_app
from candor.app.commands.deploy import deploy
from candor.app.commands.evaluate import evaluate
from candor.app.commands.finetune import finetune
from candor.app.commands.key import key
from candor.app.commands.promote import promote, rollback
from candor.app.commands.recalibrate import recalibrate
from candor.app.commands.serve import serve
from candor.app.commands.store import store_app

UNKNOWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of commands that also take vLLM's options."""

cli = typer.Typer(
    name="candor",
    help="An inference server that says when it does not know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.command(context_settings=UNKNOWN_OPTIONS)(serve)
cli.command()(deploy)
cli.command()(chat)
cli.command()(batch)
cli.command()(key)
cli.command()(recalibrate)
cli.command()(promote)
cli.command()(rollback)
cli.command(context_settings=UNKNOWN_OPTIONS)(calibrate)
cli.command(context_settings=UNKNOWN_OPTIONS)(evaluate)
cli.command()(finetune)
cli.add_typer(bundle_app, name="bundle")
cli.add_typer(data_app, name="data")
cli.add_typer(store_app, name="store")
cli.add_typer(audit_app, name="audit")


def main() -> None:
    """Runs the command; it is the console entry point."""
    try:
        cli()
    finally:
        gc.freeze()  # at a process's end Python looks for cycles among all its objects; vLLM's take seconds


if __name__ == "__main__":
    main()
