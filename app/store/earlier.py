"""The feedback file of a Candor that had no store yet: one SQLite file with verdicts, and clients' labels on them."""

from __future__ import annotations

import sqlite3
from calendar import timegm
from contextlib import closing
from pathlib import Path
from time import strptime

from candor.app.store.records import Row, StoreError
from candor.app.store.spool import Entry


def read_feedback_file(path: Path) -> list[Entry]:
    """Returns its verdicts, oldest first, and then its labels. Raises StoreError.

    It says less of a verdict than the store: not when it was given, by which rule, or whether a certificate covered
    it. So none of them was drawn for an audit, and no certificate speaks of them.
    """
    columns = "id, choice, region, reason, alpha, bundle"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
            # Labels outlive their verdicts there.
            given = file.execute(f"SELECT {columns} FROM feedback").fetchall()
            given += file.execute(f"SELECT {columns} FROM verdicts ORDER BY number").fetchall()
            labels = file.execute(
                "SELECT id, choice, correct, comment, caller, received FROM feedback"
            ).fetchall()
    except sqlite3.Error as error:
        raise StoreError(f"expected the feedback file of an earlier Candor in {path}: {error}") from error
    verdicts = {(id, choice): _verdict(id, choice, *rest) for id, choice, *rest in given}
    entries: list[Entry] = [("verdicts", row) for row in verdicts.values()]
    entries += [("thumbs", _thumb(*row)) for row in labels]
    return entries


def _verdict(id: str, choice: int, region: str, reason: str | None, alpha: float, bundle: str) -> Row:
    return {
        "id": id,
        "choice": choice,
        "time": 0.0,
        "kind": "answer",
        "model": "",
        "bundle": bundle,
        "rule": "",
        "alpha": alpha,
        "region": region,
        "reason": reason,
        "abstained": reason is not None,
        "calibrated": reason != "uncalibrated_request",
        "covered": False,
        "audit_probability": 0.0,
        "audit_least": 0.0,
        "drawn": False,
    }


def _thumb(id: str, choice: int, correct: int, comment: str | None, caller: str, received: str) -> Row:
    at = timegm(strptime(received, "%Y-%m-%d %H:%M:%S"))
    return {
        "id": id,
        "choice": choice,
        "time": float(at),
        "correct": bool(correct),
        "comment": comment,
        "caller": caller,
    }
