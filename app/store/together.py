"""What replicas with one PostgreSQL database tell each other: what keys used, and by which bundle all answer.

Each function takes a connection in a transaction. Times are the database's, so that no replica's clock counts.

    take, use     what was counted here since the last time goes in, what all counted together comes out
    begin         a replica starts: the bundle that is wanted under a name, its own if nobody else says otherwise
    beat          a replica lives; what is wanted, and what is proposed
    propose       all are to make a bundle ready -> unready: who has not yet -> settle: it is wanted from now on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Double, and_, cast, delete, extract, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from candor.app.process.promoted import Located, Promotion
from candor.app.store.tables import rates, replicas, used, wanted

SILENT_S = 10.0
"""Seconds without a beat after which a replica counts as gone."""

_now = cast(extract("epoch", func.clock_timestamp()), Double)
_lives = replicas.c.seen > _now - SILENT_S


class Wanted(NamedTuple):
    """By which bundle all answer under one name, what all are to make ready, and which replica promotes that."""

    promotion: Promotion
    proposed: Located | None = None
    proposed_by: str | None = None


class Beat(NamedTuple):
    """What a replica says of one name. serves: digest. prepared: digest that it could answer by at once.
    fault: why it cannot."""

    name: str
    serves: str
    prepared: str | None = None
    fault: str | None = None


class Taken(NamedTuple):
    """Of one limit, by key. per_minute: the rate."""

    unit: str
    per_minute: int
    amounts: Mapping[str, float]


def take(connection: Connection, taken: Taken) -> dict[str, float]:
    """Returns what is left of each key's rate, less what was taken: the bucket of `candor.app.edge.limits`."""
    if not taken.amounts:
        return {}
    rate = float(taken.per_minute)
    rows = [  # in one order, so that two replicas never wait crosswise
        {"name": name, "unit": taken.unit, "left": rate - amount, "time": _now}
        for name, amount in sorted(taken.amounts.items())
    ]
    asked = insert(rates).values(rows)
    since = func.greatest(0.0, asked.excluded.time - rates.c.time)
    left = func.least(rate, rates.c.left + rate * since / 60) + asked.excluded.left - rate
    time = func.greatest(rates.c.time, asked.excluded.time)
    asked = asked.on_conflict_do_update(
        index_elements=[rates.c.name, rates.c.unit], set_={"left": left, "time": time}
    )
    return {name: left for name, left in connection.execute(asked.returning(rates.c.name, rates.c.left))}


def use(connection: Connection, tokens: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
    """Adds tokens to what each key used on a day. Returns the sums."""
    if not tokens:
        return {}
    rows = [{"name": name, "day": day, "tokens": count} for (name, day), count in sorted(tokens.items())]
    asked = insert(used).values(rows)
    asked = asked.on_conflict_do_update(
        index_elements=[used.c.name, used.c.day], set_={"tokens": used.c.tokens + asked.excluded.tokens}
    )
    found = connection.execute(asked.returning(used.c.name, used.c.day, used.c.tokens))
    return {(name, day): count for name, day, count in found}


def begin(connection: Connection, name: str, configured: Located) -> Wanted:
    """Returns what is wanted under the name: what all others answer by; the configured bundle where nobody said, or
    where no other lives and it was configured since."""
    own = {"name": name, "over": configured.digest, "digest": configured.digest, "path": configured.path}
    connection.execute(insert(wanted).values(own).on_conflict_do_nothing())
    found = _wanted(connection.execute(select(wanted).where(wanted.c.name == name).with_for_update()).one())
    if configured.digest in (found.promotion.over, found.promotion.bundle.digest):
        return found
    if connection.scalar(select(func.count()).where(replicas.c.name == name, _lives)):
        return found
    nothing = dict.fromkeys(
        ("previous_digest", "previous_path", "proposed_digest", "proposed_path", "proposed_by")
    )
    connection.execute(update(wanted).where(wanted.c.name == name).values({**own, **nothing}))
    return Wanted(Promotion(configured.digest, configured, None))


def beat(connection: Connection, replica: str, said: Sequence[Beat]) -> dict[str, Wanted]:
    """Says that the replica lives. Returns what is wanted, by name."""
    rows = [{"replica": replica, "seen": _now, **one._asdict()} for one in said]
    asked = insert(replicas).values(rows)
    rest = {column: asked.excluded[column] for column in ("seen", "serves", "prepared", "fault")}
    connection.execute(
        asked.on_conflict_do_update(index_elements=[replicas.c.replica, replicas.c.name], set_=rest)
    )
    names = [one.name for one in said]
    found = connection.execute(select(wanted).where(wanted.c.name.in_(names)))
    return {row.name: _wanted(row) for row in found}


def leave(connection: Connection, replica: str) -> None:
    """The replica ends; nobody waits for it. Who has long been silent is forgotten too."""
    gone = or_(replicas.c.replica == replica, replicas.c.seen < _now - 100 * SILENT_S)
    connection.execute(delete(replicas).where(gone))


def propose(connection: Connection, name: str, replica: str, bundle: Located, instead_of: str) -> bool:
    """Has all replicas make a bundle ready. instead_of: digest that is wanted now.

    Returns whether it is proposed: not while another replica that lives proposes, or where another is wanted by now.
    """
    busy = and_(replicas.c.replica == wanted.c.proposed_by, replicas.c.replica != replica, _lives)
    done = connection.execute(
        update(wanted)
        .where(
            wanted.c.name == name,
            wanted.c.digest == instead_of,
            ~select(replicas.c.name).where(busy).exists(),
        )
        .values(proposed_digest=bundle.digest, proposed_path=bundle.path, proposed_by=replica)
    )
    return done.rowcount == 1


def unready(connection: Connection, name: str, replica: str, digest: str) -> dict[str, str | None]:
    """Returns the other replicas that live and could not answer by that bundle at once, each with its fault."""
    asked = select(replicas.c.replica, replicas.c.fault).where(
        replicas.c.name == name,
        replicas.c.replica != replica,
        _lives,
        replicas.c.serves != digest,
        replicas.c.prepared.is_distinct_from(digest),
    )
    return {one: fault for one, fault in connection.execute(asked)}


def settle(connection: Connection, name: str, replica: str, now: Promotion | None) -> bool:
    """Ends the replica's proposal. now: what is wanted from now on; None: what was. Returns whether it stood."""
    values: dict[str, Any] = dict.fromkeys(("proposed_digest", "proposed_path", "proposed_by"))
    if now is not None:
        values |= {"over": now.over, "digest": now.bundle.digest, "path": now.bundle.path}
        values |= {
            "previous_digest": now.previous and now.previous.digest,
            "previous_path": now.previous and now.previous.path,
        }
    of_it = (wanted.c.name == name, wanted.c.proposed_by == replica)
    return connection.execute(update(wanted).where(*of_it).values(values)).rowcount == 1


def _wanted(row: Any) -> Wanted:
    def located(path: str | None, digest: str | None) -> Located | None:
        return None if path is None or digest is None else Located(path, digest)

    previous = located(row.previous_path, row.previous_digest)
    promotion = Promotion(row.over, Located(row.path, row.digest), previous)
    return Wanted(promotion, located(row.proposed_path, row.proposed_digest), row.proposed_by)
