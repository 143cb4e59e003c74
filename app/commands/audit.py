"""`candor audit`: labels drawn answers, says how certificates stand. It works on the store; no server is asked."""

from __future__ import annotations

import getpass
import json
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from candor.app.commands.store import Store, opened

if TYPE_CHECKING:
    from candor.app.store.records import Label, Receipt

audit_app = typer.Typer(help="Label drawn answers; see how certificates stand.", no_args_is_help=True)

Reviewer = Annotated[
    str, typer.Option(default_factory=getpass.getuser, help="Who labels.", show_default="you")
]


@audit_app.command("list")
def list_certificates(store: Store) -> None:
    """Print how each certificate stands after the audits so far, and what waits for a label."""
    from candor.app.store import reading
    from candor.policy.monitor import standing

    with opened(store) as database:
        watched = database.read(reading.watched)
        for one in watched:
            audits = database.read(lambda connection, one=one: reading.audits(connection, one))  # type: ignore[misc]
            found = standing(audits, one.accuracy, 1 - one.confidence)
            typer.echo(
                f"{one.bundle[:12]} {one.rule}{f' ({one.estimator})' if one.estimator else ''} at {one.alpha:g}: "
                f"{found.name}; of {found.right + found.wrong} audits {found.right} right, {found.open} open; "
                f"evidence against {one.accuracy:g} {found.alarm:.2f}, for it {found.renewal:.2f}, of "
                f"{found.threshold:.2f} needed (log10)"
            )
        waiting = database.read(reading.waiting)
    if not watched:
        typer.echo("no answer that a certificate covers was drawn yet")
    typer.echo(
        f"without a label: {waiting['sampled']} sampled, {waiting['withheld']} withheld, "
        f"{waiting['disputed']} disputed"
    )


@audit_app.command()
def queue(
    store: Store,
    reviewer: Reviewer,
    withheld: Annotated[
        bool, typer.Option("--withheld", help="What was withheld, in place of the sample.")
    ] = False,
    disputed: Annotated[
        bool,
        typer.Option("--disputed", help="What a shadowing bundle decides otherwise, in place of the sample."),
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """Print answers that you have not labelled, a JSON object a line."""
    from candor.app.store import reading

    with opened(store) as database:
        kind: reading.Kind = "disputed" if disputed else "withheld" if withheld else "sampled"
        rows = database.read(lambda connection: reading.queue(connection, kind, reviewer, limit))
    for row in rows:
        shown = {"id": row["id"], "index": row["choice"], **_texts(row)}
        typer.echo(json.dumps(shown, ensure_ascii=False))


@audit_app.command("label")
def label_one(
    id: Annotated[str, typer.Argument(metavar="ID", help="Of the response.")],
    store: Store,
    reviewer: Reviewer,
    verdict: Annotated[str, typer.Option("--as", help="right, wrong or unclear.")],
    index: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    comment: Annotated[str | None, typer.Option(help="Kept with the label.")] = None,
    answer: Annotated[str | None, typer.Option(help="What you answer in its place.")] = None,
) -> None:
    """Label one answer. A second label by you replaces the first."""
    from candor.app.store.records import Label

    if verdict not in _VERDICTS:
        raise typer.BadParameter(f"expected right, wrong or unclear, got {verdict!r}", param_hint="--as")
    [receipt] = _write(store, [Label(id, index, _VERDICTS[verdict], reviewer, comment, answer)])
    if receipt is None:
        typer.echo(f"candor: no answer in the store has the id {id!a} and the index {index}", err=True)
        raise typer.Exit(1)
    typer.echo(receipt.outcome)


@audit_app.command()
def export(
    store: Store,
    every: Annotated[bool, typer.Option("--all", help="Also answers that nobody has labelled.")] = False,
    bundle: Annotated[
        str | None, typer.Option(help="Only those that the bundle with this digest judged.")
    ] = None,
) -> None:
    """Print labelled answers with what is kept of them, a JSON object a line, oldest first; `calibrate` and `import`
    read them."""
    from candor.app.store import reading

    with opened(store) as database, database.engine.connect() as connection:
        for row in reading.answers(connection, bundle=bundle, labelled=not every):
            shown = {
                "id": row["id"],
                "index": row["choice"],
                **_texts(row),
                "label": None if row["correct"] is None else int(row["correct"]),
                "reviewers": row["reviewers"],
                "thumb": row["thumb"],
                "time": datetime.fromtimestamp(row["time"], UTC).isoformat(),
                **{name: row[name] for name in _FIGURES},
            }
            sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")


@audit_app.command("import")
def take_labels(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines: id, label (1, 0 or null), index, ...")
    ],
    store: Store,
    reviewer: Reviewer,
) -> None:
    """Take labels from JSON Lines, such as an export that was filled in: `id`, `label` (1, 0, true, false; null:
    cannot tell), and, where wanted, `index`, `comment`, `answer_instead`, `reviewer`. Exit code 1 where an answer is
    not in the store."""
    labels = [
        _label(line, f"{file}, line {number}", reviewer)
        for number, line in enumerate(_lines(file), start=1)
        if line.strip()
    ]
    receipts = _write(store, labels)
    outcomes = Counter("not in the store" if one is None else one.outcome for one in receipts)
    typer.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no labels")
    if None in receipts:
        raise typer.Exit(1)


@audit_app.command()
def agreement(store: Store) -> None:
    """Print how far reviewers agree on answers that both of them labelled (Cohen's kappa)."""
    from candor.app.store import reading

    with opened(store) as database:
        found = database.read(reading.agreements)
    if not found:
        typer.echo("no answer was labelled by two reviewers yet")
    for (one, other), counts in found.items():
        kappa = "no value" if counts.kappa is None else f"{counts.kappa:.2f}"
        typer.echo(
            f"{one} and {other}: {counts.answers} answers, the same on {counts.share:.0%}, kappa {kappa}; "
            f"{counts.first} right by {one} alone, {counts.second} by {other} alone"
        )


_VERDICTS = {"right": True, "wrong": False, "unclear": None}
_FIGURES = (
    "model",
    "bundle",
    "rule",
    "alpha",
    "region",
    "reason",
    "abstained",
    "covered",
    "probability",
    "score",
    "prompt_p_value",
    "audit_probability",
    "drawn",
)


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    from candor.app.store.reading import conversation

    said = conversation(row)
    asked = {"messages": said} if isinstance(said, list) else {"prompt": said}
    return {**asked, "response": row["answer"]}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        typer.echo(f"candor: cannot read {file}: {error}", err=True)
        raise typer.Exit(1) from None


def _label(line: str, place: str, reviewer: str) -> Label:
    from candor.app.store.records import Label

    try:
        row = json.loads(line)
        said = row["label"]
        if said not in (0, 1, None) or not isinstance(row["id"], str):
            raise ValueError(f"expected a text as id, and 1, 0 or null as label, got {said!r}")
        return Label(
            row["id"],
            int(row.get("index", 0)),
            None if said is None else bool(said),
            str(row.get("reviewer", reviewer)),
            row.get("comment"),
            row.get("answer_instead"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        typer.echo(f"candor: {place}: expected an object with id and label; {error}", err=True)
        raise typer.Exit(1) from None


def _write(store: str, labels: list[Label]) -> list[Receipt | None]:
    receipts: list[Receipt | None] = []
    with opened(store) as database:
        for start in range(0, len(labels), 500):
            for found in database.write([("labels", one.row()) for one in labels[start : start + 500]]):
                if isinstance(found, Exception):
                    raise found
                receipts.append(found)
    return receipts
