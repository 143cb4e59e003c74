"""How much of the processor time that the engine asks for it gets, as Linux's scheduler counts it.

    share = run / (run + wait),     wait: time in which a thread could have run and another had the processor

A starved engine waits, a stuck one does neither: it sleeps or is stopped, and its share counts as 1. So a silence
that is weighed with the share is long for a stuck engine and short for a starved one. /proc/PID/task/TID/schedstat
has both times in nanoseconds; where a system has no such file, the share is 1.
"""

from __future__ import annotations

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
        if asked >= _ASKS * elapsed:
            return run / (run + wait)
        # Waiting is counted once it ends: who could run all the time and did not has no such time yet.
        return 0.0 if any(map(_could_run, times)) else 1.0

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
    def _processes() -> list[psutil.Process]:
        me = psutil.Process()
        return me.children(recursive=True) or [me]

    def _times(self) -> dict[Path, tuple[int, int]]:
        """Returns (run, wait) in ns of each thread."""
        found: dict[Path, tuple[int, int]] = {}
        for process in self._processes():
            try:
                for thread in Path(f"/proc/{process.pid}/task").iterdir():
                    run, wait, _ = (thread / "schedstat").read_text().split()
                    found[thread] = int(run), int(wait)
            except (OSError, ValueError):  # it ended meanwhile, or the system does not count
                continue
        return found


def _could_run(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False
