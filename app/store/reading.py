"""What is read from the store. Each function takes a connection: `VerdictStore.read` or `Database.read` gives one.

Where several reviewers labelled an answer, its label is what all of them say who can tell; where they differ, or none
can tell, it has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, Integer, Select, and_, case, cast, exists, func, select

from candor.app.store.records import Row
from candor.app.store.tables import contents, labels, thumbs, verdicts
from candor.policy.agreement import Agreement
from candor.policy.monitor import Audit

Kind = Literal["sampled", "withheld", "disputed"]

_said = (
    select(
        labels.c.id,
        labels.c.choice,
        func.min(cast(labels.c.correct, Integer)).label("least"),
        func.max(cast(labels.c.correct, Integer)).label("most"),
        func.count().label("reviewers"),
        func.max(labels.c.time).label("labelled"),
    )
    .group_by(labels.c.id, labels.c.choice)
    .subquery()
)
_correct = case((_said.c.least == _said.c.most, _said.c.least)).label("correct")

_withheld = and_(
    verdicts.c.abstained, ~verdicts.c.covered
)  # what a suspended certificate covers is audited on


def _same(one: Any, other: Any) -> ColumnElement[bool]:
    return and_(one.c.id == other.c.id, one.c.choice == other.c.choice)


class Watched(NamedTuple):
    """A certificate that answers were covered by."""

    bundle: str
    rule: str
    estimator: str | None
    alpha: float
    accuracy: float
    confidence: float


def watched(connection: Connection) -> list[Watched]:
    """Returns the certificates of all drawn answers."""
    columns = [verdicts.c[name] for name in Watched._fields]
    asked = select(*columns).where(verdicts.c.drawn, verdicts.c.covered).distinct()
    return [Watched(*row) for row in connection.execute(asked)]


def audits(connection: Connection, certificate: Watched) -> list[Audit]:
    """Returns the drawn answers that the certificate covers, in the order in which they were given."""
    asked = (
        select(verdicts.c.audit_probability, verdicts.c.audit_least, _correct)
        .select_from(verdicts.outerjoin(_said, _same(verdicts, _said)))
        .where(
            verdicts.c.drawn,
            verdicts.c.covered,
            verdicts.c.bundle == certificate.bundle,
            verdicts.c.rule == certificate.rule,
            verdicts.c.alpha == certificate.alpha,
            verdicts.c.estimator.is_not_distinct_from(certificate.estimator),
        )
        .order_by(verdicts.c.number)
    )
    return [
        Audit(probability, least, None if correct is None else bool(correct))
        for probability, least, correct in connection.execute(asked)
    ]


def labels_made(connection: Connection) -> tuple[int, float | None]:
    """Returns the number of labels and the time of the last: as long as neither changes, no standing does."""
    count, last = connection.execute(select(func.count(), func.max(labels.c.time))).one()
    return count, last


def answers(connection: Connection, *, bundle: str | None = None, labelled: bool = True) -> Iterator[Row]:
    """Yields answers as the table `verdicts` has them, oldest first, with what is kept of them.

    Each row also has conversation, answer, h, prompt_states (float32 bytes), `correct` (the reviewers' label, None
    if there is none), `reviewers` and `thumb` (the client's). labelled: only those that a reviewer labelled.
    """
    asked = _with_contents().order_by(verdicts.c.number)
    if bundle is not None:
        asked = asked.where(verdicts.c.bundle == bundle)
    if labelled:
        asked = asked.where(_said.c.reviewers > 0)
    for row in connection.execution_options(yield_per=256).execute(asked).mappings():
        yield _shown(row)


def usable(connection: Connection, bundles: Sequence[str]) -> Iterator[Row]:
    """Yields what a next bundle may be made from, as `answers` does: what these bundles judged, and was drawn or
    labelled."""
    asked = _with_contents().order_by(verdicts.c.number).where(verdicts.c.bundle.in_(bundles))
    asked = asked.where(verdicts.c.drawn | (_said.c.reviewers > 0))
    for row in connection.execution_options(yield_per=256).execute(asked).mappings():
        yield _shown(row)


def labelled_by_bundle(connection: Connection) -> dict[str, int]:
    """Returns how many answers of each bundle reviewers labelled, by its digest."""
    asked = (
        select(verdicts.c.bundle, func.count())
        .join(_said, _same(verdicts, _said))
        .group_by(verdicts.c.bundle)
    )
    return {bundle: count for bundle, count in connection.execute(asked)}


def queue(connection: Connection, kind: Kind, reviewer: str, limit: int = 50) -> list[Row]:
    """Returns answers that this reviewer has not labelled, as `answers` does.

    sampled: drawn, and let through or covered by a suspended certificate; those that nobody labelled come first, the
    oldest of them first, so that evidence has no gaps.
    withheld: drawn ones first, then the newest. disputed: those on which a shadowing bundle decides otherwise,
    likewise.
    """
    mine = exists().where(_same(labels, verdicts), labels.c.reviewer == reviewer)
    asked = _with_contents().where(verdicts.c.kind != "pair", ~mine).limit(limit)
    nobody = _said.c.reviewers.is_not(None)
    if kind == "sampled":
        asked = asked.where(verdicts.c.drawn, ~_withheld).order_by(nobody, verdicts.c.number)
    else:
        asked = asked.where(_withheld if kind == "withheld" else verdicts.c.disputed_by.is_not(None))
        asked = asked.order_by(nobody, verdicts.c.drawn.desc(), verdicts.c.number.desc())
    return [_shown(row) for row in connection.execute(asked).mappings()]


def waiting(connection: Connection) -> dict[Kind, int]:
    """Returns how many answers nobody has labelled, by the queue they stand in: drawn ones, and disputed ones."""
    labelled = exists().where(_same(labels, verdicts))
    asked = select(_withheld, func.count()).where(verdicts.c.drawn, ~labelled).group_by(_withheld)
    found = {bool(withheld): count for withheld, count in connection.execute(asked)}
    disputed = select(func.count()).where(verdicts.c.disputed_by.is_not(None), ~labelled)
    return {
        "sampled": found.get(False, 0),
        "withheld": found.get(True, 0),
        "disputed": connection.scalar(disputed) or 0,
    }


def prompts(connection: Connection, bundle: str, most: int) -> list[tuple[float, str]]:
    """Returns each prompt that its gate saw among the store's last `most` verdicts, oldest first: its p, and the name
    of the key that asked ("" if it was forgotten). One that departs from the policy is none."""
    newest = connection.scalar(select(func.max(verdicts.c.number))) or 0
    asked = select(verdicts.c.prompt_p_value, func.coalesce(verdicts.c.caller, "")).where(
        verdicts.c.number > newest - most,
        verdicts.c.bundle == bundle,
        verdicts.c.kind != "pair",
        verdicts.c.choice == 0,
        verdicts.c.calibrated,
        verdicts.c.prompt_p_value.is_not(None),
    )
    return [(p, caller) for p, caller in connection.execute(asked.order_by(verdicts.c.number))]


def outcome(connection: Connection, id: str) -> list[Row]:
    """Returns what became of each choice of a response: its verdict, and what reviewers said; [] if it is unknown."""
    asked = _with_contents().where(verdicts.c.id == id).order_by(verdicts.c.choice)
    rows = [_shown(row) for row in connection.execute(asked).mappings()]
    said = select(labels).where(labels.c.id == id).order_by(labels.c.time.desc())
    given = list(connection.execute(said).mappings())
    for row in rows:
        of_it = [one for one in given if one["choice"] == row["choice"]]
        row["human_answer"] = next((one["answer"] for one in of_it if one["answer"] is not None), None)
    return rows


def conversation(row: Row) -> Any:
    """Returns the conversation of a row of `answers`, turns or a plain prompt; None if it is not kept."""
    kept = row["conversation"]
    return None if kept is None else json.loads(kept)


def agreements(connection: Connection) -> dict[tuple[str, str], Agreement]:
    """Returns how far each two reviewers agree who labelled some of the same answers."""
    first, second = labels.alias(), labels.alias()
    asked = (
        select(first.c.reviewer, second.c.reviewer, first.c.correct, second.c.correct)
        .join(second, and_(_same(first, second), first.c.reviewer < second.c.reviewer))
        .where(first.c.correct.is_not(None), second.c.correct.is_not(None))
        .order_by(first.c.reviewer, second.c.reviewer)
    )
    pairs: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for one, other, says, thinks in connection.execute(asked):
        pairs.setdefault((one, other), []).append((bool(says), bool(thinks)))
    return {both: Agreement.of(said) for both, said in pairs.items()}


def _with_contents() -> Select[Any]:
    thumb = thumbs.c.correct.label("thumb")
    kept = [contents.c[name] for name in ("conversation", "answer", "h", "prompt_states")]
    joined = (
        verdicts.outerjoin(_said, _same(verdicts, _said))
        .outerjoin(contents, _same(verdicts, contents))
        .outerjoin(thumbs, _same(verdicts, thumbs))
    )
    return select(verdicts, _correct, _said.c.reviewers, thumb, *kept).select_from(joined)


def _shown(row: Any) -> Row:
    correct = row["correct"]
    return dict(row) | {
        "correct": None if correct is None else bool(correct),
        "reviewers": row["reviewers"] or 0,
    }
