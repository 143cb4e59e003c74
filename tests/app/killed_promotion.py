"""Servers that are killed on the way of a promotion or rollback (test_renewal.py starts it).

    python killed_promotion.py

Reads cases from standard input, each {"folder", "change", "step"}: a folder with the bundles `old`, which is
configured, and `new`; "promote" or "rollback"; the last step that is done before SIGKILL. In a process of its own for
each case, a server takes feedback and then changes its bundle. Writes what became of each case: the id of the answer
whose feedback was acknowledged, and the signal that ended the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from candor.app.process import promoted, renewal


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(step: str) -> None:
    sync = os.fsync

    def sync_or_die(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").is_dir():  # the folder, once the file is in place
            _die()
        sync(file)

    patches: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "checked": (promoted.json, "dumps", lambda *_, **__: _die()),
        "written": (promoted.os, "replace", _die),
        "in place": (promoted.os, "fsync", sync_or_die),
        "switched": (renewal.Renewal, "_describe", _die),
    }
    setattr(*patches[step])


def _change(doubles: Any, case: dict[str, str], say: int) -> None:
    folder = Path(case["folder"])
    engine = doubles.scripted(doubles.IDENTITY, doubles.bundle_of(doubles.fitted(), doubles.IDENTITY))
    start = doubles.serving_from(engine)
    with start(folder / "old", store=str(folder / "store.db")) as server:
        if case["change"] == "rollback":
            server.client.post("/bundles/promote", json={"bundle": "new"}).raise_for_status()
        answer = server.chat("hello").json()["id"]
        feedback = {"id": answer, "correct": True}
        server.client.post("/v1/reliability/feedback", json=feedback).raise_for_status()
        os.write(say, answer.encode())
        _die_after(case["step"])
        wanted = {"bundle": "new"} if case["change"] == "promote" else {}
        server.client.post(f"/bundles/{case['change']}", json=wanted)


def main() -> None:
    doubles: Any = import_module("conftest")  # beside this script
    found = []
    for case in json.load(sys.stdin):
        heard, say = os.pipe()
        child = os.fork()  # only one thread lives here, so a fork is safe
        if child == 0:
            try:
                _change(doubles, case, say)
            finally:
                os._exit(0)
        os.close(say)
        _, status = os.waitpid(child, 0)
        with os.fdopen(heard) as pipe:
            found.append([pipe.read(), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
