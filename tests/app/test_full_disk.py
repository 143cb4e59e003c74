"""A disk that is really full: the store lies on a file system of its own of two megabytes.

The spool lies on the same disk, or on another that has room. The server is killed while the disk is full, and begins
again on it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("full_disk.py")
ROOT = SCRIPT.parents[2]
NO_MOUNT = 77
MOUNTED = f"""
mount -t tmpfs -o size=2m tmpfs "$1" || exit {NO_MOUNT}
"$2" "$3" "$1" "$4" fill        # it kills itself
"$2" "$3" "$1" "$4" again && cp "$1"/store.db* "$5"
"""


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "spool elsewhere"])
def test_what_was_acknowledged_before_and_on_a_full_disk_is_there(tmp_path: Path, elsewhere: bool) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir(), out.mkdir()  # type: ignore[func-returns-value]
    spool = tmp_path / "spool" if elsewhere else disk / "store.db.spool"
    command = ["unshare", "--mount", "sh", "-c", MOUNTED, "sh", disk, sys.executable, SCRIPT, spool, out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == NO_MOUNT or done.stderr.startswith("unshare:"):
        pytest.skip(f"no file system of its own to be had here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    filled, again = map(json.loads, done.stdout.splitlines())

    assert filled["behind"]
    assert filled["promoted"] == "No space left on device"
    assert again["promotion_stands"]
    assert "database or disk is full" in done.stderr
    assert ("[Errno 28] No space left on device" in done.stderr) == (not elsewhere)
    on_full_disk = ["thumbs a100000", "labels a100000"] if elsewhere else []
    assert again["full"] == on_full_disk
    assert again["mended"] == ["thumbs a100001", "labels a100001"]
    assert (again["behind"], filled["lost"], again["lost"]) == (False, 0, 0)

    acknowledged = {*filled["acknowledged"], *again["full"], *again["mended"]}
    assert len(acknowledged) > 50
    assert (len(filled["acknowledged"]) == 2 * filled["given"]) == elsewhere
    with closing(sqlite3.connect(out / "store.db")) as file:
        kept = {
            f"{table} {id}"
            for table in ("thumbs", "labels")
            for (id,) in file.execute(f"SELECT id FROM {table}")
        }
        verdicts = {id for (id,) in file.execute("SELECT id FROM verdicts WHERE drawn")}
    assert kept == acknowledged  # nothing is lost, and nothing that was refused is there
    assert {name.split()[1] for name in acknowledged} <= verdicts
