"""How much of the processor time that the engine asks for it gets, as Linux's scheduler counts it.

    share = run / (run + wait),     wait: time in which a thread could have run and another had the processor

A starved engine waits, a stuck one does neither: it sleeps or is stopped, and its share counts as 1. So a silence
that is weighed with the share is long for a stuck engine and short for a starved one. /proc/PID/task/TID/schedstat
has both times in nanoseconds; where a system has no such file, the share is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from time import monotonic

import psutil
from prometheus_client import REGISTRY

_ASKS = 0.05  # of one processor: whoever asks for less than that is asleep
_STEPS = "vllm:iteration_tokens_total_count"


class EngineProcessors:
    """The engine's processes: all that this process started, or itself if there are none."""

    def __init__(self) -> None:
        self._last, self._then = self._times(), monotonic()

    def share(self) -> float:
        """Returns the share since the last call, in [0, 1]."""
        now, times = monotonic(), self._times()
        run = wait = 0
        for thread, (ran, waited) in times.items():
            before = self._last.get(thread, (ran, waited))  # a new thread: what came before it is not known
            run += ran - before[0]
            wait += waited - before[1]
        elapsed, self._last, self._then = now - self._then, times, now
        asked = (run + wait) / 1e9
        return 1.0 if asked < _ASKS * elapsed else run / (run + wait)

    @staticmethod
    def steps() -> float:
        """Returns how many steps the engine has made; 0 if it does not count them."""
        return sum(
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == _STEPS
        )

    @staticmethod
    def _times() -> dict[Path, tuple[int, int]]:
        """Returns (run, wait) in ns of each thread."""
        me = psutil.Process()
        processes: Iterable[psutil.Process] = me.children(recursive=True) or [me]
        found: dict[Path, tuple[int, int]] = {}
        for process in processes:
            try:
                for thread in Path(f"/proc/{process.pid}/task").iterdir():
                    run, wait, _ = (thread / "schedstat").read_text().split()
                    found[thread] = int(run), int(wait)
            except (OSError, ValueError):  # it ended meanwhile, or the system does not count
                continue
        return found
