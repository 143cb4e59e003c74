"""Metrics of the server itself: what it refused before it knew who asked, how it holds up, how old its keys are.

They stand in one registry with the verdicts' metrics and begin at 0.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge

from candor.app.answering.waiting import EngineWatch
from candor.app.edge.connections import Connections

_EVERY_S = 0.1
_WINDOW_S = 15.0


class ServerMetrics:
    """Instruments without a model's label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._connections = Counter(
            "candor_connections_refused",
            "Connections that were refused or cut, by cause.",
            ["cause"],
            registry=registry,
        )
        for cause in Connections.CAUSES:
            self._connections.labels(cause)
        self._keys = Gauge(
            "candor_keys_stale_seconds", "Seconds for which the keys could not be read.", registry=registry
        )
        self._behind = Gauge(
            "candor_store_behind", "Whether verdicts or labels wait for the store.", registry=registry
        )
        self._lost = Gauge(
            "candor_store_verdicts_lost",
            "Verdicts that neither store nor spool could take.",
            registry=registry,
        )
        self._lag = Gauge(
            "candor_event_loop_lag_seconds",
            "Longest wait for the event loop in the last quarter of a minute.",
            registry=registry,
        )
        self._starved = Gauge(
            "candor_engine_starved",
            "Whether the engine gets too little processor time to answer; new requests are refused meanwhile.",
            registry=registry,
        )
        self._share = Gauge(
            "candor_engine_processor_share",
            "Share of the processor time it asks for that the engine gets.",
            registry=registry,
        )

    def watch_keys(self, stale_s: Callable[[], float]) -> None:
        self._keys.set_function(stale_s)

    def watch_store(self, behind: Callable[[], bool], lost: Callable[[], int]) -> None:
        """behind: whether something waits to be written. lost: verdicts that could not be kept."""
        self._behind.set_function(behind)
        self._lost.set_function(lost)

    def refused_connection(self, cause: str) -> None:
        self._connections.labels(cause).inc()

    async def run(self, watch: EngineWatch) -> None:
        """Measures the event loop's lag and follows the watch, until it is cancelled."""
        waits: deque[float] = deque(maxlen=round(_WINDOW_S / _EVERY_S))
        while True:
            before = monotonic()
            await asyncio.sleep(_EVERY_S)
            waits.append(monotonic() - before - _EVERY_S)
            self._lag.set(max(waits))
            self._starved.set(watch.starved)
            self._share.set(watch.share)
