"""A server in a process of its own, from its settings to its exit code, with the script of conftest.py as its engine.

    python replica.py PORT                   settings from the environment
    python replica.py PORT MODEL BUNDLE      with a real engine

What the script says to a prompt: "slow" 40 pieces in 2 s, anything else an answer at once. Four times a second it
prints the longest time for which its event loop ran without a pause, in seconds of its thread's processor time, so
that a busy machine does not count: `held 0.012`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from candor.app.process.backend import Backend, start_backend
from candor.app.process.server import run
from candor.app.process.settings import Settings
from candor.app.telemetry import logs


async def _watch_loop() -> None:
    longest, told, last = 0.0, time.monotonic(), time.thread_time()
    while True:
        await asyncio.sleep(0.001)
        now = time.thread_time()
        longest, last = max(longest, now - last), now
        if time.monotonic() - told > 0.25:
            print(f"held {longest:.4f}", flush=True)
            longest, told = 0.0, time.monotonic()


def main() -> int:
    port, *real = sys.argv[1:]
    model, bundle = map(Path, real or ("m", "b"))
    tasks = []

    async def start(settings: Settings) -> Backend:
        tasks.append(asyncio.create_task(_watch_loop()))
        return await start_backend(settings) if real else _scripted()

    logs.configure("text")
    return run(Settings(model=model, bundle=bundle, port=int(port)), start)


def _scripted() -> Backend:
    doubles: Any = import_module("conftest")  # beside this script
    bundle = doubles.bundle_of(doubles.fitted(), doubles.IDENTITY)
    engine = doubles.scripted(doubles.IDENTITY, bundle)
    engine.script("slow", pieces=("a ",) * 40, pause_s=0.05)
    return Backend(engine, doubles.LetterFormat(), bundle)


if __name__ == "__main__":
    sys.exit(main())
