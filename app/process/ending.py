"""Shutdown: on SIGTERM, a command ends itself and every process that it started; a server leaves first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

    After `within_s` seconds, what remains of the processes started within it, and of theirs, is killed, and so
    is this process if it hangs. The context must be entered in the main thread.
    """
    owner = os.getpid()
    before_us = set(psutil.Process().children())  # whoever runs this in its own process has them to itself
    started: list[psutil.Process] = []
    told = threading.Event()

    def ours() -> list[psutil.Process]:
        found = []
        for child in set(psutil.Process().children()) - before_us:
            with suppress(psutil.NoSuchProcess):
                if any("multiprocessing.resource_tracker" in word for word in child.cmdline()):
                    continue  # Python's own, which ends with this process and then clears its shared memory away
                found += [child, *child.children(recursive=True)]
        return found

    def give_up() -> None:
        _kill([*started, *ours()])
        os._exit(code)

    timer = threading.Timer(within_s, give_up)
    timer.daemon = True

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # this is a fork that has not yet set its own handler
            os._exit(code)
        if not told.is_set():
            told.set()
            started.extend(ours())  # now: a process whose parent has ended is no longer found
            timer.start()
            raise SystemExit(code)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if told.is_set():
            left = [one for one in (*started, *ours()) if _runs(one)]
            psutil.wait_procs(left, timeout=within_s / 2)
            _kill(left)
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _runs(process: psutil.Process) -> bool:
    try:
        # Where a machine's first process is slow to take them, ended ones lie about as zombies.
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()  # psutil first checks that the PID is still the same process
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=1)  # a kill takes time too
