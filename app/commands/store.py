"""`candor store`: takes an earlier feedback file over, forgets an answer. Neither command starts a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from candor.app.store.database import Database

store_app = typer.Typer(help="The store of verdicts and labels.", no_args_is_help=True)

Store = Annotated[
    str,
    typer.Option(
        default_factory=str,
        envvar="CANDOR_STORE",
        show_default=False,
        help="SQLite file, or URL of a PostgreSQL database.",
    ),
]


@contextmanager
def opened(store: str) -> Iterator[Database]:
    """Gives the database. What fails is printed in one line, with exit code 1."""
    from sqlalchemy.exc import SQLAlchemyError

    from candor.app.store.database import Database
    from candor.app.store.records import StoreError, StoreUnavailable

    if not store:
        typer.echo("candor: expected a store: give --store, or set CANDOR_STORE as for the server", err=True)
        raise typer.Exit(2)
    try:
        database = Database.open(store)
        try:
            yield database
        finally:
            database.close()
    except (StoreError, StoreUnavailable, SQLAlchemyError, OSError) as error:
        typer.echo(f"candor: {getattr(error, 'orig', None) or error}", err=True)
        raise typer.Exit(1) from None


@store_app.command("import")
def take_over(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Feedback file of an earlier Candor.")],
    store: Store,
) -> None:
    """Take over verdicts and feedback of an earlier Candor's file (CANDOR_FEEDBACK). The file stays as it is."""
    from candor.app.store.earlier import read_feedback_file

    with opened(store) as database:
        entries = read_feedback_file(file)
        for start in range(0, len(entries), 500):
            database.write(entries[start : start + 500])
    thumbs = sum(table == "thumbs" for table, _ in entries)
    typer.echo(f"took over {len(entries) - thumbs} verdicts and {thumbs} labels of clients")


@store_app.command()
def forget(
    id: Annotated[str, typer.Argument(metavar="ID", help="Of the response.")],
    store: Store,
    index: Annotated[int | None, typer.Option(help="Of the choice. Without it, all choices.")] = None,
) -> None:
    """Delete the texts, states and comments of an answer, and who asked; figures and labels stay. Exit code 1 if it
    is not in the store."""
    from candor.app.store.store import forget as forget_answer

    with opened(store) as database:
        choices = forget_answer(database, id, index)
    if not choices:
        typer.echo(
            "candor: no such answer in the store; one that a server gave while it could not write to the store comes "
            "later",
            err=True,
        )
        raise typer.Exit(1)
    typer.echo(f"forgot {choices} answer{'s' if choices > 1 else ''}")
