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

_ASKS = 0.5
"""Of one processor. Who only wakes now and then asks for less, though it may wait long each time."""
_STEPS = "vllm:iteration_tokens_total_count"


class EngineProcessors:
    """The engine's processes: all that this process started, or itself if there are none."""

    def __init__(self) -> None:
        self._last, self._then = self._times(), monotonic()
        self._could_run: set[Path] = set()

    def share(self) -> float:
        """Returns the share since the last call, in [0, 1]."""
        now, times = monotonic(), self._times()
        elapsed, last = now - self._then, self._last
        # A new thread: what came before it is not known.
        spent = {
            one: [a - b for a, b in zip(two, last.get(one, two), strict=True)] for one, two in times.items()
        }
        could_run = {one for one in times if _could_run(one)}
        always = [spent[one][0] for one in could_run & self._could_run]
        self._last, self._then, self._could_run = times, now, could_run
        if always:  # waiting is counted once it ends, so theirs is what they did not run
            return min(1.0, sum(always) / 1e9 / (elapsed * len(always)))
        run, asked = sum(ran for ran, _ in spent.values()), sum(map(sum, spent.values()))
        return run / asked if asked / 1e9 >= _ASKS * elapsed else 1.0

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
