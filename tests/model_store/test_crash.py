"""A publisher killed by SIGKILL anywhere leaves the old bundle, the new one or nothing; never half of one.

What a power cut would do beyond that, to data that the kernel holds but no disk does, is not tested.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candor.model_store.bundle import Exemplar, load_bundle
from candor.model_store.manifest import NAMES, Manifest
from candor.model_store.store import publish
from candor.sdm.estimator import SDMEstimator

Files = dict[str, bytes]
SCRIPT = Path(__file__).with_name("killed_publish.py")
ROOT = SCRIPT.parents[2]
STEPS = (
    "made the staging directory",
    *(f"wrote {name}" for name in sorted(NAMES)),
    "verified",
    "put in place",
    "made durable",
)
SHARES = [i / 5 for i in range(6)]


@pytest.fixture
def publish_old(
    manifest: Manifest, estimator: SDMEstimator, exemplars: tuple[Exemplar, ...]
) -> Callable[..., str]:
    def publish_old(path: Path, **options: Any) -> str:
        return publish(path, manifest, estimator, exemplars, {"text": "x" * 10**6}, **options)

    return publish_old


def _run(source: Path, cases: list[dict[str, Any]]) -> list[int]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(source)],
        input=json.dumps(cases),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ended: list[int] = json.loads(done.stdout)
    return ended


def test_the_steps_are_these(tmp_path: Path, publish_old: Callable[..., str]) -> None:
    steps: list[str] = []
    publish_old(tmp_path / "bundle", on_step=steps.append)
    assert sorted(steps) == sorted(STEPS)
    assert steps[0] == STEPS[0]
    assert tuple(steps[-3:]) == STEPS[-3:]


def test_killed_anywhere(tmp_path: Path, publish_old: Callable[..., str]) -> None:
    source = tmp_path / "source"
    publish_old(source)
    cases: list[dict[str, Any]] = []
    for number, where in enumerate([{"step": one} for one in STEPS] + [{"share": one} for one in SHARES]):
        for before in ("nothing", "old"):
            path = tmp_path / f"{before}-{number}" / "bundle"
            cases.append({"path": str(path), "before": before, **where})
            if before == "old":
                publish_old(path)

    ended = _run(source, cases)

    for case, signalled in zip(cases, ended, strict=True):
        path = Path(case["path"])
        found = load_bundle(path).manifest.name if path.exists() else "nothing"
        if "step" in case:
            assert signalled == signal.SIGKILL
            is_done = case["step"] in ("put in place", "made durable")
            assert found == ("new" if is_done else {"nothing": "nothing", "old": "demo"}[case["before"]])
        elif case["before"] == "old":
            assert found in ("demo", "new")
        else:
            assert found in ("nothing", "new")
        if path.parent.exists():
            beside = [one.name for one in path.parent.iterdir() if one != path]
            assert len(beside) <= 1
            assert all(name.startswith(".tmp-") for name in beside)

        publish_old(path, replace=True)
        assert load_bundle(path).manifest.name == "demo"
        assert list(path.parent.iterdir()) == [path]
