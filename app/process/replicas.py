"""Replicas with one PostgreSQL database agree: on the bundle that answers, and on what each key has used.

    promote     proposed -> every replica that lives makes it ready, or says why it cannot -> wanted -> all switch
    a beat      this replica lives; by another bundle than the wanted one it does not answer, and is not ready
    an exchange what keys used here goes in, what they used everywhere comes back

Nobody waits for the database but whoever promotes. While it is away, each replica answers by the bundle that it has
and counts by itself; what it counted goes in later.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from candor.app.edge.limits import RateLimit
from candor.app.edge.quotas import Quotas
from candor.app.edge.services import ServedModel, Slot
from candor.app.process.promoted import Located, Promotion, Promotions, located
from candor.app.store import together
from candor.app.store.database import Database, is_shared
from candor.app.store.records import StoreError
from candor.app.store.together import Beat, Taken, Wanted
from candor.model_store.directory import read_manifest

if TYPE_CHECKING:
    from candor.app.process.renewal import Renewal
    from candor.app.process.settings import Settings

logger = logging.getLogger("candor")
Result = TypeVar("Result")

EXCHANGED_EVERY_S = 0.25
"""Seconds for which a replica does not know what the others let a key do."""
_BEAT_S = 1.0
_SOON_S = 0.1  # between beats while a bundle is proposed, so that all switch at nearly the same time
_AGAIN_S = 10.0  # until a bundle that could not be followed is tried again
_AGREED_WITHIN_S = 120.0


class NotAgreed(Exception):
    """The replicas do not all answer by what is to be promoted; nothing has changed. The message says who."""


class SharedPromotions(Promotions):
    """What is promoted, as all replicas of one database have it. path: tells the folder of the bundles alone."""

    def __init__(self, path: Path, store: str) -> None:
        """Raises StoreError."""
        self.path = path
        self.over = {}
        self._entries: Mapping[str, Promotion] = {}
        self.database = Database.open(store)
        self._one_at_a_time = threading.Lock()
        self._closed = False
        self.replica = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"

    def serving(self, configured: Path) -> Path:
        """Returns the directory to serve where that one is configured: of what the others answer by.

        Raises BundleError, PromotedFileError or StoreError.
        """
        manifest, digest = read_manifest(configured)
        wanted = self.begin(manifest.name, Located(str(configured.resolve()), digest)).promotion
        if wanted.bundle.digest == digest:
            return configured
        if wanted.over == digest:
            try:
                return located(wanted.bundle, Path("the store"))
            except BaseException:
                self.close()
                raise
        logger.warning("%s is configured, and other replicas answer by %s", digest, wanted.bundle.digest)
        return configured

    def begin(self, name: str, configured: Located) -> Wanted:
        """Returns what is wanted under the name, by default the configured bundle. Raises StoreError."""
        self.over[name] = configured.digest
        try:
            wanted = self.write(lambda connection: together.begin(connection, name, configured))
        except SQLAlchemyError as error:
            raise StoreError(f"cannot ask the store which bundle is wanted: {_reason(error)}") from error
        self.learn(name, wanted.promotion)
        return wanted

    def learn(self, name: str, promotion: Promotion) -> None:
        self._entries = {**self._entries, name: promotion}

    def put(self, name: str, promotion: Promotion) -> None:
        """Returns once every replica could answer by the bundle and it is wanted from now on.

        Raises NotAgreed, or OSError where the database is away.
        """
        try:
            self._put(name, promotion)
        except SQLAlchemyError as error:
            raise OSError(f"the store cannot be written: {_reason(error)}") from error
        self.learn(name, promotion)

    def _put(self, name: str, promotion: Promotion) -> None:
        bundle, now = promotion.bundle, self._entries[name].bundle.digest
        if not self.write(lambda one: together.propose(one, name, self.replica, bundle, now)):
            raise NotAgreed("another replica promotes, or has promoted: look what came of it first")
        settled: Promotion | None = None
        try:
            self._wait(name, bundle.digest)
            settled = promotion
        finally:
            stood = self.write(lambda one: together.settle(one, name, self.replica, settled))
        if not stood:
            raise NotAgreed("this replica was taken for gone meanwhile, and another promotes")

    def _wait(self, name: str, digest: str) -> None:
        deadline = time.monotonic() + _AGREED_WITHIN_S
        while missing := self.write(lambda one: together.unready(one, name, self.replica, digest)):
            faults = [f"{replica}: {fault}" for replica, fault in missing.items() if fault]
            if faults or time.monotonic() > deadline:
                why = "; ".join(faults) or f"not ready in {_AGREED_WITHIN_S:g} s: {', '.join(missing)}"
                raise NotAgreed(f"not every replica can answer by {digest[:12]}: {why}")
            time.sleep(_SOON_S)

    def write(self, do: Callable[[Connection], Result]) -> Result:
        """Returns what `do` gives in one transaction. Raises SQLAlchemyError."""
        with self._one_at_a_time:
            if self._closed:
                raise SQLAlchemyError("this replica ends")
            with self.database.changing() as connection:
                return do(connection)

    def close(self) -> None:
        """Waits for what a thread still writes."""
        with self._one_at_a_time:
            self._closed = True
            self.database.close()


def promotions_of(settings: Settings) -> Promotions:
    """Returns what was promoted: for all replicas of a PostgreSQL store, else for this server alone.

    Raises PromotedFileError or StoreError.
    """
    own = Promotions.beside(settings.bundle)
    if settings.store is None or not is_shared(settings.store):
        return own
    if settings.quotas is not None:
        raise StoreError(
            "CANDOR_QUOTAS is a file of one replica's own. With a PostgreSQL store, what keys use is counted there, "
            "for all replicas: leave it out"
        )
    return SharedPromotions(own.path, settings.store)


class Replicas:
    """This replica among the others. slots: what answers here. rates, quotas: what is counted together."""

    def __init__(
        self,
        shared: SharedPromotions,
        renewal: Renewal,
        slots: Iterable[Slot],
        rates: Sequence[RateLimit],
        quotas: Quotas,
    ) -> None:
        self._shared = shared
        self._renewal = renewal
        self._slots = {slot.current.bundle.manifest.name: slot for slot in slots}
        self._rates = [rate for rate in rates if rate.per_minute is not None]
        self._quotas = quotas
        self._prepared: dict[str, ServedModel] = {}
        self._faults: dict[str, tuple[str, str]] = {}  # name: digest, why
        self._works: dict[str, asyncio.Task[None]] = {}
        self._again_at = 0.0
        self._hurry = False
        self.away = False
        """Whether the database could not be asked at the last try."""

    async def run(self) -> None:
        """Beats and exchanges until it is cancelled."""
        beaten = time.monotonic()
        while True:
            await asyncio.sleep(_SOON_S if self._hurry else EXCHANGED_EVERY_S)
            await self.exchange()
            if self._hurry or time.monotonic() - beaten >= _BEAT_S:
                beaten = time.monotonic()
                await self.beat()

    async def exchange(self) -> None:
        """Tells what keys used here, and learns what they used everywhere."""
        taken = [(rate, rate.unsent()) for rate in self._rates]
        tokens = self._quotas.unsent()

        def both(connection: Connection) -> None:
            # What is counted may be lost with the database's machine; nobody waits for its disk.
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            left = [
                together.take(connection, Taken(rate.unit, rate.per_minute or 0, amounts))
                for rate, amounts in taken
            ]
            found.extend(left)
            sums.update(together.use(connection, tokens))

        found: list[dict[str, float]] = []
        sums: dict[tuple[str, int], int] = {}
        if not tokens and not any(amounts for _, amounts in taken):
            return
        if await self._ask(both) is _AWAY:
            for rate, amounts in taken:
                rate.put_back(amounts)
            self._quotas.put_back(tokens)
            return
        for (rate, _), left in zip(taken, found, strict=True):
            rate.told(left)
        self._quotas.told(sums)

    async def beat(self) -> None:
        """Says that this replica lives, and follows what is wanted and what is proposed."""
        said = [self._said(name, slot) for name, slot in self._slots.items()]
        found = await self._ask(lambda connection: together.beat(connection, self._shared.replica, said))
        if found is _AWAY:
            return
        assert isinstance(found, dict)
        self._hurry = any(wanted.proposed is not None for wanted in found.values())
        for name, wanted in found.items():
            if wanted.proposed_by == self._shared.replica and not self._slots[name].changing:
                # It could not be ended, for the database was away then.
                await self._ask(partial(together.settle, name=name, replica=self._shared.replica, now=None))
            self._follow(name, self._slots[name], wanted)

    async def close(self) -> None:
        """Ends what is being made ready, and says that this replica is gone."""
        for work in self._works.values():
            work.cancel()
        await self._ask(lambda connection: together.leave(connection, self._shared.replica))
        await asyncio.to_thread(self._shared.close)

    def _said(self, name: str, slot: Slot) -> Beat:
        prepared = self._prepared.get(name)
        fault = self._faults.get(name)
        ready = prepared.bundle.digest if prepared else None
        return Beat(name, slot.current.bundle.digest, ready, fault and fault[1])

    def _follow(self, name: str, slot: Slot, wanted: Wanted) -> None:
        """Switches to what is wanted, makes ready what is proposed, and forgets what is neither."""
        if slot.changing:  # it is promoted here
            return
        self._shared.learn(name, wanted.promotion)
        now, serves = wanted.promotion.bundle, slot.current.bundle.digest
        target = wanted.proposed or now
        prepared = self._prepared.get(name)
        if prepared is not None and prepared.bundle.digest == now.digest != serves:
            self._renewal.follow(slot, self._prepared.pop(name), wanted.promotion)
            serves = now.digest
        elif prepared is not None and prepared.bundle.digest != target.digest:
            self._renewal.drop(slot, self._prepared.pop(name))
        fault = self._faults.get(name)
        if fault is not None and fault[0] != target.digest:
            self._faults.pop(name)
        slot.behind = None if serves == now.digest else self._behind(name, now, serves)
        known = self._prepared[name].bundle.digest if name in self._prepared else serves
        tried = name in self._faults and time.monotonic() < self._again_at
        working = name in self._works and not self._works[name].done()
        if target.digest not in (serves, known) and not tried and not working:
            self._works[name] = asyncio.create_task(self._prepare(name, slot, target))

    def _behind(self, name: str, now: Located, serves: str) -> str:
        digest, why = self._faults.get(name, ("", ""))
        why = why if digest == now.digest and why else "it is being made ready"
        return (
            f"this replica has the bundle {serves[:12]}, and all are to answer by {now.digest[:12]} in {now.path}: "
            f"{why}"
        )

    async def _prepare(self, name: str, slot: Slot, bundle: Located) -> None:
        try:
            self._prepared[name] = await self._renewal.prepared(slot, bundle)
            self._faults.pop(name, None)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it is, the others have to know
            logger.error("this replica cannot answer by %s in %s: %s", bundle.digest[:12], bundle.path, error)
            self._faults[name] = (bundle.digest, str(error) or type(error).__name__)
            self._again_at = time.monotonic() + _AGAIN_S
        with suppress(Exception):
            await self.beat()

    async def _ask(self, do: Callable[[Connection], Result]) -> Result | object:
        try:
            found = await asyncio.to_thread(self._shared.write, do)
        except SQLAlchemyError as error:
            if not self.away:
                logger.error("replicas do not agree for now, each counts by itself: %s", _reason(error))
            self.away = True
            return _AWAY
        if self.away:
            logger.info("replicas agree again")
        self.away = False
        return found


_AWAY = object()


def _reason(error: SQLAlchemyError) -> object:
    return getattr(error, "orig", None) or error
