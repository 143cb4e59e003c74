"""Shutdown: on SIGTERM, a command ends itself and every process that it started; a server leaves first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

PATIENCE_S = 4.0
"""Seconds for an orderly shutdown; what remains after them is killed."""


class ShuttingDown(Exception):
    """The server is about to end, and is not ready for new requests."""


class Leaving:
    """Whether this server is about to end. Meanwhile it answers, but says that it is not ready."""

    def __init__(self) -> None:
        self.begun = False


@contextmanager
def ending_children(code: int, within_s: float = PATIENCE_S) -> Iterator[None]:
    """Within this context, SIGTERM raises SystemExit(code), so that `finally` blocks close things in order.

    After `within_s` seconds, remaining descendants of this process are killed, and so is this process if it hangs.
    The context must be entered in the main thread.
    """
    owner = os.getpid()
    started: list[psutil.Process] = []
    told = threading.Event()

    def give_up() -> None:
        _kill([*started, *_descendants()])
        os._exit(code)

    timer = threading.Timer(within_s, give_up)
    timer.daemon = True

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # this is a fork that has not yet set its own handler
            os._exit(code)
        if not told.is_set():
            told.set()
            started.extend(_descendants())  # now: a process whose parent has ended is no longer found
            timer.start()
            raise SystemExit(code)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if told.is_set():
            left = [*started, *_descendants()]
            psutil.wait_procs(left, timeout=within_s / 2)
            _kill(left)
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()  # psutil first checks that the PID is still the same process
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=1)  # a kill takes time too
