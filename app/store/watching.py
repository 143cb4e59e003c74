"""How the served certificates stand, as the store's audits have it: read again whenever a label came.

Where the store cannot be read, what was found last stays. Every replica with the same store comes to the same, for a
standing follows from the labels alone (`candor.policy.monitor`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection

from candor.app.store import reading
from candor.app.store.records import StoreUnavailable
from candor.app.store.store import VerdictStore
from candor.policy.certificate import Certificate, RuleCertificate
from candor.policy.monitor import Standing, standing

logger = logging.getLogger("candor")

_EVERY_S = 5.0
_WHOLE_S = 60.0
"""Seconds after which the audits are read again though no label came: more answers were drawn."""

Certified = Certificate | RuleCertificate


@dataclass(frozen=True)
class Served:
    """A certificate that judges here. model: the name it is served under. bundle: digest."""

    model: str
    bundle: str
    certificate: Certified

    @property
    def watched(self) -> reading.Watched:
        one = self.certificate
        rule = "two-gates" if isinstance(one, RuleCertificate) else "sdm"
        return reading.Watched(
            self.bundle, rule, getattr(one, "estimator", None), one.alpha, one.accuracy, one.confidence
        )


class CertificateWatch:
    """served: the certificates that judge now; it is asked each time, for bundles are promoted. changed: called with
    each of them and its standing whenever it was read."""

    def __init__(
        self,
        store: VerdictStore,
        served: Callable[[], Iterable[Served]],
        changed: Callable[[Served, Standing], None] = lambda *_: None,
    ) -> None:
        self._store = store
        self._served = served
        self._changed = changed
        self._standings: dict[reading.Watched, Standing] = {}
        self._seen: tuple[int, float | None] | None = None
        self._whole_at = 0.0
        self._wake = asyncio.Event()

    def of(self, bundle: str, certificate: Certified) -> Standing | None:
        """Returns the certificate's standing; None as long as the store could not be read."""
        return self._standings.get(Served("", bundle, certificate).watched)

    def wake(self, *, whole: bool = False) -> None:
        """Has it look now: a label came. whole: or other certificates judge."""
        self._whole_at = 0.0 if whole else self._whole_at
        self._wake.set()

    async def run(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _EVERY_S)
            self._wake.clear()
            await self.look()

    async def look(self) -> None:
        """Reads the standings, if there is anything new."""
        now = asyncio.get_running_loop().time()
        try:
            found = await self._store.read(
                lambda connection: self._read(connection, whole=now >= self._whole_at)
            )
        except StoreUnavailable as error:
            logger.warning("certificates stand as they did: %s", error)
            return
        if not found:
            return
        self._whole_at = now + _WHOLE_S
        for served, stands in found.items():
            before = self._standings.get(served.watched)
            if (stands.name == "suspended") != (before is not None and before.name == "suspended"):
                self._say(served, stands)
            self._standings[served.watched] = stands
            self._changed(served, stands)

    def _read(self, connection: Connection, *, whole: bool) -> dict[Served, Standing]:
        seen = reading.labels_made(connection)
        if seen == self._seen and not whole:
            return {}
        found = {
            served: standing(
                reading.audits(connection, served.watched),
                served.certificate.accuracy,
                1 - served.certificate.confidence,
            )
            for served in self._served()
        }
        self._seen = seen
        return found

    @staticmethod
    def _say(served: Served, stands: Standing) -> None:
        logger.warning(
            "the certificate of %s at alpha %g is %s: of its audits %d are right and %d wrong",
            served.model,
            served.certificate.alpha,
            stands.name,
            stands.right,
            stands.wrong,
        )
