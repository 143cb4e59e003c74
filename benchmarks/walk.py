"""Lists the files that one chat request runs through, from the socket to the body.

    python -m benchmarks.walk

A real server answers over HTTP; the scripted engine of tests/app replaces the engine. The benchmark counts the
project's files in which a function runs on the event loop's thread while one request is answered; a first request is
not counted. Files that run in other threads (the mathematics) are listed separately.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    double = engine_double()
    walked: dict[str, set[str]] = defaultdict(set)  # files by thread
    recording = threading.Event()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and recording.is_set():
            file = Path(frame.f_code.co_filename).resolve()
            if (
                file.exists()
                and file.is_relative_to(ROOT)
                and not {"tests", ".venv"} & set(file.relative_to(ROOT).parts)
            ):
                walked[threading.current_thread().name].add(str(file.relative_to(ROOT)))

    threading.setprofile(note)
    estimator, identity = made_by(double.estimator)(), made_by(double.identity)()
    bundle = made_by(double.bundle)(estimator, identity)
    with double.running(double.scripted(identity, bundle), bundle, double.make_settings()) as server:
        server.chat("ask")
        recording.set()
        server.chat("ask").raise_for_status()
        recording.clear()
    loop, beside = [], set()
    for thread, files in walked.items():
        if thread.startswith(("candor-", "uvloop_")):
            beside |= files
        else:
            loop += sorted(files)
    typer.echo(f"{len(loop)} files on the event loop:\n  " + "\n  ".join(loop))
    typer.echo(f"{len(beside)} files beside it:\n  " + "\n  ".join(sorted(beside)))


def engine_double() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_double", ROOT / "tests/app/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made_by(fixture: Any) -> Any:
    """The function behind a pytest fixture."""
    return getattr(fixture, "__wrapped__", None) or fixture._fixture_function


if __name__ == "__main__":
    typer.run(main)
