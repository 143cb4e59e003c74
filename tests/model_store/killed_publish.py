"""Publishes in processes of its own that are killed on the way (test_crash.py starts it).

Reads a list of cases from standard input, each {"path", "step"} or {"path", "share"}: the process dies
by SIGKILL as soon as that step is done, or after that share of the time that a whole publishing takes.
Writes the list of what ended each process: a signal's number, or 0.

Usage: python killed_publish.py BUNDLE, whose content is what is published, under the name "new".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish


def _in_a_child(work: Callable[[], object]) -> int:
    """The child's process id. Only one thread lives here, so a fork is safe."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def main(source: Path) -> None:
    bundle = load_bundle(source)
    manifest = replace(bundle.manifest, name="new", files={})

    def publish_to(path: Path, step: str | None = None) -> None:
        def die(done: str) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        publish(path, manifest, bundle.estimator, bundle.exemplars, bundle.report, replace=True, on_step=die)

    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        os.waitpid(_in_a_child(lambda: publish_to(Path(folder) / "whole")), 0)
        whole = time.monotonic() - start

    def run(case: dict[str, Any]) -> int:
        child = _in_a_child(lambda: publish_to(Path(case["path"]), case.get("step")))
        if "share" in case:
            time.sleep(case["share"] * whole)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    print(json.dumps([run(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
