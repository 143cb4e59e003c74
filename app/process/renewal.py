"""Another bundle without a restart: what answers under a name is made here, promoted, and rolled back.

    promote    find and load the bundle -> does it fit: model, representation, policy, alphas, signature
               -> its certificates -> golden prompts -> written to the disk -> switched -> acknowledged
    roll back  written to the disk -> switched -> acknowledged; what was replaced stays loaded for that

The switch is one assignment. A request reads its slot once, so it ends with the bundle that it began with, and no
request waits for a switch. A server that dies before the write comes back with the old bundle, one that dies after it
with the new.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from opentelemetry.trace import Tracer

from candor.app.answering.decisions import DecisionResolver, DecisionService
from candor.app.answering.escalation import Escalation
from candor.app.answering.request import certified_alphas, default_alpha, gates_of
from candor.app.answering.scoring import Scorer
from candor.app.answering.shadow import Seen, Shadow
from candor.app.answering.waiting import EngineWatch
from candor.app.edge.limits import Admission, Refused
from candor.app.edge.services import ServedModel, Slot
from candor.app.process.backend import Backend
from candor.app.process.promoted import Located, PromotedFileError, Promotion, Promotions, located
from candor.app.process.replicas import NotAgreed
from candor.app.process.selftest import SelfTest
from candor.app.process.settings import Settings
from candor.app.store.reading import prompts
from candor.app.store.records import Dispute, StoreUnavailable
from candor.app.store.store import VerdictStore
from candor.app.store.watching import CertificateWatch, Certified, Served
from candor.app.telemetry.drifting import PromptDrift
from candor.app.telemetry.metrics import Metrics
from candor.engine.base import EngineError
from candor.model_store.bundle import Bundle
from candor.model_store.directory import read_manifest
from candor.model_store.errors import BundleError
from candor.model_store.identity import check_identity, require_successor
from candor.model_store.signing import load_signed
from candor.model_store.store import resolve
from candor.policy.certificate import RuleKind
from candor.policy.monitor import Standing, StandingName

logger = logging.getLogger("candor")

_RECALLED = 10_000
"""Verdicts of the store whose prompts count on when a bundle begins to answer: less than a second's work."""


class NotPromoted(Exception):
    """A promotion or rollback that is refused; nothing has changed. The message says why."""


class ChangeUnderWay(NotPromoted):
    """Another promotion or rollback of the same model has begun."""


class ChangeNotKept(NotPromoted):
    """The promotion could not be written to the disk, so it would not survive a restart."""


class Renewal:
    """Makes what answers under each name. It owns the scorers: close it at the end."""

    def __init__(
        self,
        settings: Settings,
        promotions: Promotions,
        metrics: Metrics,
        admission: Admission,
        watch: EngineWatch,
        store: VerdictStore | None,
        tracer: Tracer | None,
        escalation: Escalation | None,
    ) -> None:
        self._settings = settings
        self._promotions = promotions
        self._metrics = metrics
        self._admission = admission
        self._watch = watch
        self._store = store
        self._tracer = tracer
        self._escalation = escalation
        self._certificates: CertificateWatch | None = None
        self._scorers: set[Scorer] = set()
        self._shadows: set[Shadow] = set()

    async def begin(
        self, name: str, backend: Backend, resolver: DecisionResolver, selftest: SelfTest
    ) -> Slot:
        """Returns the slot that answers by the backend's bundle, and has its shadow score too."""
        path = backend.path or self._settings.bundle
        model = await self._model(name, backend, path, resolver, selftest)
        if backend.shadow is not None:
            scorer = await self._scorer(backend.shadow[1])
            model = replace(model, shadow=self._shadow(name, backend.shadow[1], scorer))
        self._describe(model)
        return Slot(backend, model)

    async def watch_certificates(self, slots: Mapping[str, Slot]) -> CertificateWatch | None:
        """Returns the watch over what judges under these names, which has looked once; None without a store."""
        if self._store is None:
            return None

        def served() -> list[Served]:
            return [
                Served(slot.current.name, slot.current.bundle.digest, certificate)
                for slot in slots.values()
                for certificate in slot.current.certificates(self._settings.estimator)
            ]

        def changed(one: Served, stands: Standing) -> None:
            current = slots[one.model].current
            if current.bundle.digest == one.bundle:
                current.metrics.stands(one.watched.rule, one.certificate.alpha, stands)

        self._certificates = CertificateWatch(self._store, served, changed)
        await self._certificates.look()
        return self._certificates

    async def promote(self, slot: Slot, reference: str | None) -> ServedModel:
        """Has the bundle answer that `reference` names: a path, a name, or the first digits of a digest; None: the
        one that shadows. Returns what answers now.

        Raises NotPromoted or BundleNotFound; then nothing has changed.
        """
        with _alone(slot):
            old = slot.current
            path, digest = await asyncio.to_thread(self._find, slot, reference)
            if digest == old.bundle.digest:
                if slot.behind is None:
                    raise NotPromoted(f"the bundle {digest} answers already")
                # Others answer by another; from now on all are to answer by this one.
                await self._keep(old, _located(old), None)
                slot.behind = None
                return old
            new: ServedModel | None = None
            within_s = self._settings.engine_stall_timeout_s
            try:
                new = await self._made(slot, path, digest)
                require_certified(old, new, self._settings)
                await asyncio.wait_for(new.selftest.check(), within_s)
                await self._keep(old, _located(new), _located(old))
            except TimeoutError:
                self.drop(slot, new)
                raise NotPromoted(f"the golden prompts were not answered within {within_s:g} s") from None
            except (BundleError, EngineError, Refused) as error:
                self.drop(slot, new)
                raise NotPromoted(f"the bundle in {path} is not promoted: {error}") from error
            except BaseException:
                self.drop(slot, new)
                raise
            self._advance(slot, new)
            return new

    async def roll_back(self, slot: Slot) -> ServedModel:
        """Has the bundle answer that answered before the last promotion. Returns it.

        Raises NotPromoted; then nothing has changed.
        """
        with _alone(slot):
            old, name = slot.current, slot.current.bundle.manifest.name
            previous, kept = slot.previous, self._promotions.of(name)
            if previous is None:  # it was promoted before a restart, or never
                if kept is None or kept.previous is None or kept.bundle.digest != old.bundle.digest:
                    raise NotPromoted("nothing was promoted here, so there is nothing to go back to")
                try:
                    path = await asyncio.to_thread(located, kept.previous, self._promotions.path)
                    previous = await self._made(slot, path, kept.previous.digest, follows=False)
                except (BundleError, EngineError, Refused, PromotedFileError) as error:
                    raise NotPromoted(f"the earlier bundle cannot be served: {error}") from error
            await self._keep(old, _located(previous), None)
            self._withdraw(slot, previous)
            return previous

    async def prepared(self, slot: Slot, bundle: Located) -> ServedModel:
        """Returns what could answer by that bundle at once, which another replica promotes or rolls back to.

        Raises BundleError, PromotedFileError, EngineError, Refused or TimeoutError.
        """
        for kept in (slot.previous, slot.withdrawn):
            if kept is not None and kept.bundle.digest == bundle.digest:
                return kept
        path = await asyncio.to_thread(located, bundle, Path("the store"))
        new = await self._made(slot, path, bundle.digest, follows=False)
        try:
            await asyncio.wait_for(new.selftest.check(), self._settings.engine_stall_timeout_s)
        except BaseException:
            self.drop(slot, new)
            raise
        return new

    def follow(self, slot: Slot, new: ServedModel, promotion: Promotion) -> None:
        """Has what was prepared answer, as another replica promoted it or rolled back to it."""
        if promotion.previous is not None and promotion.previous.digest == slot.current.bundle.digest:
            self._advance(slot, new)
        else:
            self._withdraw(slot, new)

    async def close(self) -> None:
        for shadow in self._shadows:
            await shadow.close()
        for scorer in self._scorers:
            scorer.close()

    def _find(self, slot: Slot, reference: str | None) -> tuple[Path, str]:
        """Returns the directory that is meant, and the digest of the bundle that is there now."""
        shadow = slot.backend.shadow
        folder = self._promotions.path.parent
        if reference is None and shadow is None:
            raise NotPromoted("expected a bundle to promote; none shadows here that could be meant")
        try:
            path = shadow[0] if reference is None and shadow is not None else resolve(reference or "", folder)
            whole = path.resolve()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise NotPromoted(f"expected a bundle's path, name or digest: {error}") from error
        if whole.parent != folder.resolve() and (shadow is None or whole != shadow[0].resolve()):
            raise NotPromoted(
                f"expected a bundle in {folder}, where the configured one lies, or the one that shadows; got {path}"
            )
        digest = read_manifest(whole)[1]
        if reference is None and shadow is not None and digest != shadow[1].digest:
            raise NotPromoted(
                f"the bundle in {path} is another than the one that shadows; name it to promote it"
            )
        return whole, digest

    async def _made(self, slot: Slot, path: Path, digest: str, *, follows: bool = True) -> ServedModel:
        """Returns what answers by the bundle of that digest in `path`. follows: it was not served here before.

        Raises BundleError, EngineError or Refused.
        """
        old, backend, shadow = slot.current, slot.backend, slot.backend.shadow
        if slot.withdrawn is not None and slot.withdrawn.bundle.digest == digest:
            return slot.withdrawn
        if shadow is not None and shadow[1].digest == digest:
            bundle = shadow[1]
        else:
            bundle = await asyncio.to_thread(load_signed, path, self._settings.bundle_key)
        check_identity(backend.engine, bundle)
        if follows:
            require_successor(old.bundle, bundle)
        default_alpha(self._settings.alpha, bundle.manifest.alphas)
        certified_alphas(bundle, self._settings)
        ready = replace(backend, bundle=bundle, path=path)
        resolver = DecisionResolver(ready, self._settings)
        selftest = await asyncio.to_thread(SelfTest, ready)
        new = await self._model(old.name, ready, path, resolver, selftest)
        if old.shadow is not None and old.shadow.bundle.digest != bundle.digest:
            new = replace(new, shadow=self._shadow(old.name, old.shadow.bundle, old.shadow.scorer))
        return new

    async def _model(
        self, name: str, backend: Backend, path: Path, resolver: DecisionResolver, selftest: SelfTest
    ) -> ServedModel:
        bundle, metrics = backend.bundle, self._metrics.of(name)
        scorer = await self._scorer(bundle, self._standing_name)
        gates = scorer.gates
        metrics.expect(gates)
        cascade = bundle.manifest.cascade if gates else None
        service = DecisionService(
            backend.engine,
            bundle.policy,
            scorer,
            self._admission,
            metrics,
            self._watch,
            self._tracer,
            self._escalation.of(cascade, metrics) if self._escalation else None,
        )
        rule: RuleKind = "two-gates" if gates else "sdm"
        drift = PromptDrift(len(gates.rule.gate.reference), metrics.drift) if gates else None
        if drift is not None and self._store is not None:
            await self._recall(drift, bundle.digest)
        standing = partial(self._standing, bundle.digest)
        return ServedModel(
            name, bundle, path, rule, resolver, scorer, service, selftest, metrics, drift, standing
        )

    async def _recall(self, drift: PromptDrift, digest: str) -> None:
        """Has it take the prompts that the store has of this bundle."""
        assert self._store is not None
        try:
            seen = await self._store.read(lambda connection: prompts(connection, digest, _RECALLED))
        except StoreUnavailable as error:
            logger.warning("evidence that prompts changed begins anew: %s", error)
        else:
            await asyncio.to_thread(drift.recall, seen)

    def _standing(self, digest: str, certificate: Certified) -> Standing | None:
        return self._certificates.of(digest, certificate) if self._certificates else None

    def _standing_name(self, digest: str, certificate: Certified) -> StandingName | None:
        found = self._standing(digest, certificate)
        return found.name if found else None

    async def _scorer(
        self, bundle: Bundle, standing: Callable[[str, Certified], StandingName | None] = lambda *_: None
    ) -> Scorer:
        settings = self._settings
        scorer = Scorer(
            bundle,
            settings.estimator,
            settings.scoring_timeout_s,
            gates_of(bundle, settings),
            partial(standing, bundle.digest),
            withholds_suspended=settings.on_suspended == "abstain",
        )
        self._scorers.add(scorer)
        await scorer.warm_up()
        return scorer

    def _shadow(self, name: str, bundle: Bundle, scorer: Scorer) -> Shadow:
        metrics = self._metrics.of(name)
        metrics.begin_shadow()

        def tell(seen: Seen | None) -> None:
            metrics.shadowed(seen and (seen.old, seen.new))
            if seen is not None and seen.differs and self._store is not None:
                self._store.dispute(Dispute(seen.sent.id, seen.sent.index, bundle.digest))

        shadow = Shadow(bundle, scorer, tell)
        self._shadows.add(shadow)
        return shadow

    async def _keep(self, old: ServedModel, now: Located, previous: Located | None) -> None:
        """Writes what is to answer from now on. Raises ChangeNotKept."""
        name = old.bundle.manifest.name
        over = self._promotions.over.setdefault(name, old.bundle.digest)
        try:
            await asyncio.to_thread(self._promotions.put, name, Promotion(over, now, previous))
        except NotAgreed as error:
            raise NotPromoted(str(error)) from error
        except OSError as error:
            raise ChangeNotKept(
                f"{old.bundle.digest} goes on answering, for what was promoted cannot be written: {error}"
            ) from error

    def _advance(self, slot: Slot, new: ServedModel) -> None:
        self._retire(slot.previous, slot.withdrawn, keep=new)
        slot.previous, slot.withdrawn = slot.current, None
        self._switch(slot, new)

    def _withdraw(self, slot: Slot, previous: ServedModel) -> None:
        slot.previous, slot.withdrawn = None, slot.current
        self._switch(slot, previous)

    def _switch(self, slot: Slot, new: ServedModel) -> None:
        logger.info(
            "%s answers by %s now, before by %s", new.name, new.bundle.digest, slot.current.bundle.digest
        )
        slot.current, slot.behind = new, None
        self._describe(new)
        if self._certificates is not None:
            self._certificates.wake(whole=True)

    def drop(self, slot: Slot, model: ServedModel | None) -> None:
        """Closes the scorer of what was made and is not promoted."""
        if model is not None and model not in (slot.previous, slot.withdrawn):
            self._close(model.scorer)

    def _describe(self, model: ServedModel) -> None:
        model.metrics.describe(model.bundle, self._settings.estimator, model.scorer.gates)

    def _retire(self, *models: ServedModel | None, keep: ServedModel) -> None:
        """Closes their scorers once no request can use them any more."""
        longest_s = self._settings.request_timeout_s + self._settings.scoring_timeout_s
        for model in models:
            if model is not None and model is not keep:
                asyncio.get_running_loop().call_later(longest_s, self._close, model.scorer)

    def _close(self, scorer: Scorer) -> None:
        self._scorers.discard(scorer)
        scorer.close()


def require_certified(old: ServedModel, new: ServedModel, settings: Settings) -> None:
    """Raises NotPromoted unless the new bundle promises at least what the old one does, at each of its alphas."""
    before, after = (_promised(one, settings) for one in (old, new))
    missing = [
        f"at alpha {alpha:g} {accuracy:g} is certified now, and by that bundle {after.get(alpha, 'nothing')}"
        for alpha, accuracy in before.items()
        if after.get(alpha, 0.0) < accuracy
    ]
    if old.bundle.manifest.cascade is not None and new.bundle.manifest.cascade is None:
        missing.append(
            "what it and another model answer together is certified now, and by that bundle nothing"
        )
    if missing:
        raise NotPromoted(
            f"the bundle {new.bundle.digest[:12]} promises less than the one that answers: {'; '.join(missing)}. "
            "Label more audits and recalibrate, or restart with it as the configured bundle"
        )


def _promised(model: ServedModel, settings: Settings) -> dict[float, float]:
    """Certified accuracies by alpha, of the rule that serves."""
    gates, manifest = model.scorer.gates, model.bundle.manifest
    if gates is not None:
        return {one.alpha: one.accuracy for one in gates.terms.certificates}
    return {one.alpha: one.accuracy for one in manifest.certificates if one.estimator == settings.estimator}


def _located(model: ServedModel) -> Located:
    return Located(str(model.path.resolve()), model.bundle.digest)


@contextmanager
def _alone(slot: Slot) -> Iterator[None]:
    if slot.changing:
        raise ChangeUnderWay(
            "another promotion or rollback of this model is under way; look what came of it first"
        )
    slot.changing = True
    try:
        yield
    finally:
        slot.changing = False
