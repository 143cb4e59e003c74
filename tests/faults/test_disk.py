"""A full disk, and processes that die while a bundle is made: what stood stands, nothing half is served."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from candor.model_store.bundle import load_bundle
from demo.task import made

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
CANDOR = Path(sys.executable).with_name("candor")

PUBLISH = """
import sys
from dataclasses import replace
from pathlib import Path
from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish

source, disk = Path(sys.argv[1]), Path(sys.argv[2])
bundle = load_bundle(source)
small = replace(bundle.manifest, files={})
publish(disk / "bundle", small, bundle.estimator, bundle.exemplars, bundle.report, bundle.rule.rule)
first = load_bundle(disk / "bundle").digest
(disk / "ballast").write_bytes(b"x" * (1 << 19))  # less is left now than a second bundle needs
try:
    new = replace(small, name="new")
    publish(disk / "bundle", new, bundle.estimator, bundle.exemplars, bundle.report, bundle.rule.rule, replace=True)
except OSError as error:
    print(error.errno, load_bundle(disk / "bundle").digest == first, sorted(one.name for one in disk.iterdir()))
(disk / "ballast").unlink()
(disk / "more").write_bytes(b"")
"""


def test_a_full_disk_while_publishing(tmp_path: Path) -> None:
    """On a file system of its own that is really full: the old bundle stands, whole, and nothing beside it."""
    source = ROOT / "demo/bundle"
    size = sum(file.stat().st_size for file in source.iterdir())
    script = tmp_path / "publish.py"
    script.write_text(PUBLISH)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size + (1 << 20)} tmpfs {disk}"
    mounted = f"{mount} && exec {sys.executable} {script} {source} {disk}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system of its own to be had here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "28 True ['ballast', 'bundle']\n"  # 28: no space left on device


def test_calibration_killed_and_begun_again(tmp_path: Path, demo_model: Path) -> None:
    """kill -9 amid the answers: no bundle and no half of one; begun again, no answer that was kept is asked again."""
    lines = made("calibration").read_text().splitlines()[:320]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    out, cache = tmp_path / "bundle", tmp_path / "cache"
    command = [CANDOR, "calibrate", "--model", demo_model, "--data", data, "--alpha", "0.9", "--out", out]
    command += ["--max-tokens", "64", "--max-model-len", "512", "--rounds", "1", "--epochs", "5"]
    command += ["--hidden-cache", cache]

    def kept() -> list[str]:
        """Keys of the answers that are committed, oldest first, as another process sees them."""
        for file in cache.glob("*.sqlite"):
            try:
                with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
                    rows = database.execute("SELECT key FROM answers ORDER BY rowid").fetchall()
                    return [key for (key,) in rows]
            except sqlite3.Error:  # being created
                return []
        return []

    with (tmp_path / "first").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 600
            while len(kept()) < 20:
                assert time.monotonic() < deadline
                assert first.poll() is None, (tmp_path / "first").read_text()[-2000:]
                time.sleep(0.05)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    before = kept()
    assert 20 <= len(before) < len(lines)
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_bundle(out).manifest.provenance["data"]["records"] == len(lines)
    assert kept()[: len(before)] == before  # an answer that is asked again would be a new row
    print(f"\nkilled with {len(before)} of {len(lines)} answers kept")


def test_publishing_killed_at_every_step() -> None:
    """tests/model_store/test_crash.py, which runs with all tests: named here so that the suite is whole."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/model_store/test_crash.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
