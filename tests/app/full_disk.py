"""Fills the small disk that it is given, with what is acknowledged on the way, and says what came of it as JSON.

python full_disk.py DISK SPOOL fill      fills it until nothing is acknowledged, or a spool elsewhere has much; then
                                         kills itself
python full_disk.py DISK SPOOL again     opens the store there while the disk is full, makes room, and writes on
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from candor.app.process.promoted import Located, Promotion, Promotions
from candor.app.store.drawing import Drawing
from candor.app.store.records import Feedback, GivenVerdict, Label, LabelNotKept
from candor.app.store.store import VerdictStore
from candor.policy.decision import Verdict

HIGH = Verdict("high", False, None, 0.9, calibrated=True)
BEFORE, AFTER = (Promotion("o" * 64, Located("/p", name * 64), None) for name in "ab")
TRIES = 40
"""Feedback in a row that is not kept, until the disk counts as full: space comes back where a log is checkpointed."""

MOST = 200
"""Answers that are given at most, where the spool lies on another disk and takes all of them."""


async def give(store: VerdictStore, number: int) -> list[str]:
    """Gives an answer, a client's feedback on it and a reviewer's label; returns which of them are acknowledged."""
    store.note([GivenVerdict(f"a{number}", 0, HIGH, "digest")])
    feedback = Feedback(f"a{number}", 0, True, "x" * 500, "alice")
    label = Label(f"a{number}", 0, False, "ann", "x" * 500)
    kept = []
    for name, waits in (("thumbs", store.take(feedback)), ("labels", store.label(label))):
        try:
            await waits
            kept.append(f"{name} a{number}")
        except LabelNotKept:
            pass
    return kept


def told(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def opened(disk: Path, spool: Path) -> VerdictStore:
    return VerdictStore(str(disk / "store.db"), spool, drawing=Drawing(1.0))


async def fill(disk: Path, spool: Path) -> None:
    Promotions(disk / "b.promoted.json").put("tiny", BEFORE)
    (disk / "ballast").write_bytes(b"x" * (1 << 19))
    store = opened(disk, spool)
    acknowledged: list[str] = []
    number = refused = 0
    while refused < TRIES and number < MOST:
        kept = await give(store, number)
        acknowledged += kept
        refused = 0 if kept else refused + 1
        number += 1
    spooled = store.behind
    try:
        Promotions(disk / "b.promoted.json").put("tiny", AFTER)
        promoted = "written"
    except OSError as error:
        promoted = os.strerror(error.errno or 0)
    told(acknowledged=acknowledged, given=number, behind=spooled, lost=store.lost, promoted=promoted)
    os.kill(os.getpid(), signal.SIGKILL)


async def again(disk: Path, spool: Path) -> None:
    stands = Promotions(disk / "b.promoted.json").of("tiny") == BEFORE
    store = opened(disk, spool)
    full = await give(store, 100_000)
    (disk / "ballast").unlink()
    deadline = time.monotonic() + 30
    while store.behind and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    mended = await give(store, 100_001)
    Promotions(disk / "b.promoted.json").put("tiny", AFTER)
    behind, lost = store.behind, store.lost
    await store.close()
    told(promotion_stands=stands, full=full, mended=mended, behind=behind, lost=lost)


if __name__ == "__main__":
    asyncio.run({"fill": fill, "again": again}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2])))
