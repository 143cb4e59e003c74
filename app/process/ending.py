"""What a command ends when it is told to end: itself and every process that it started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

PATIENCE_S = 4.0
"""What closes an engine in order gets this long."""


@contextmanager
def ending_children(code: int, within_s: float = PATIENCE_S) -> Iterator[None]:
    """Until it is left, SIGTERM raises SystemExit(code), so that what is being started or running is closed in order.

    Whatever of this process's descendants is left after `within_s` is killed; so is this process, where it is stuck.
    To be entered in the main thread.
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
        if os.getpid() != owner:  # a fork that has not yet set its own
            os._exit(code)
        if not told.is_set():
            told.set()
            started.extend(_descendants())  # now: those whose parent ends first are nobody's then
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
            process.kill()  # psutil looks first whether the number is still the same process's
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=1)  # for being killed takes its time too
