"""The services: the lifespan makes them, and every handler gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypedDict, TypeVar, cast

from fastapi import Depends, Request

from candor.app.answering.decisions import DecisionResolver, DecisionService
from candor.app.answering.preparing import Preparing
from candor.app.answering.request import Bulk
from candor.app.answering.scoring import Scorer
from candor.app.answering.shadow import Shadow
from candor.app.answering.waiting import EngineWatch
from candor.app.edge.keys import Key
from candor.app.edge.limits import Admission, Overloaded, RateLimit
from candor.app.edge.quotas import Quotas
from candor.app.process.ending import Leaving
from candor.app.process.selftest import SelfTest
from candor.app.store.records import GivenVerdict
from candor.app.store.store import VerdictStore
from candor.app.store.watching import CertificateWatch
from candor.app.telemetry.drifting import PromptDrift
from candor.app.telemetry.metrics import Metrics
from candor.engine.base import Engine
from candor.model_store.bundle import Bundle
from candor.policy.certificate import Certificate, EstimatorKind, RuleCertificate, RuleKind
from candor.policy.monitor import Standing

if TYPE_CHECKING:
    from candor.app.edge.routes.surface import Surface
    from candor.app.process.backend import Backend
    from candor.app.process.renewal import Renewal
    from candor.app.process.replicas import Replicas


class Charged(Protocol):
    """A resolved request. tokens: at most. caller: whose places it takes."""

    @property
    def tokens(self) -> int: ...

    @property
    def caller(self) -> str: ...


Resolved = TypeVar("Resolved", bound=Charged)

PIN = "x-sdm-bundle"
"""The header by which a request pins a bundle, and a response names the one that judged."""

_CHARACTERS_PER_TOKEN = 4
"""To charge for a prompt before it is tokenised; afterwards the charge is corrected."""


class ModelNotFound(Exception):
    """A request names a model that is not served."""


class BundleBehind(Exception):
    """The other replicas answer by another bundle than this one has."""


class AnotherBundle(Exception):
    """A request pins a bundle, and another answers by now. bundle: digest of the one that does."""

    def __init__(self, pinned: str, bundle: str) -> None:
        super().__init__(
            f"this request is for the bundle {pinned[:64]!a}, and {bundle} answers here: read what it promises "
            "(`GET /v1/reliability`), then ask for it, or for none"
        )
        self.bundle = bundle


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name, with its bundle: the base model, or that model under an adapter.

    Nothing in it changes, so a request that holds it ends with the bundle that it began with. path: the bundle's
    directory. rule: by which its answers are let through. shadow: scores the same answers too; None: none does.
    """

    name: str
    bundle: Bundle
    path: Path
    rule: RuleKind
    resolver: DecisionResolver
    scorer: Scorer
    service: DecisionService
    selftest: SelfTest
    metrics: Metrics
    drift: PromptDrift | None = None  # where two gates judge
    standing: Callable[[Certificate | RuleCertificate], Standing | None] = lambda _: None
    shadow: Shadow | None = None

    def certificates(self, estimator: EstimatorKind) -> tuple[Certificate | RuleCertificate, ...]:
        """Returns the certificates that judge here."""
        manifest = self.bundle.manifest
        if self.rule == "two-gates":
            return manifest.rule.certificates if manifest.rule else ()
        return tuple(one for one in manifest.certificates if one.estimator == estimator)


@dataclass
class Slot:
    """A name that requests give, and what answers under it now: the one thing that a promotion changes.

    previous: what a rollback goes back to, still loaded. withdrawn: what was rolled back from, likewise. changing:
    whether a promotion or a rollback is under way. behind: why this replica does not answer by what all are to
    answer by; None: it does.
    """

    backend: Backend
    current: ServedModel
    previous: ServedModel | None = None
    withdrawn: ServedModel | None = None
    changing: bool = False
    behind: str | None = None


@dataclass(frozen=True)
class Services:
    """The objects that handlers use.

    slots: by each name that they answer to; the first is the default. pinned: digest of the bundle that the request's
    header asks for.
    """

    engine: Engine
    slots: Mapping[str, Slot]
    admission: Admission
    token_rate: RateLimit
    quotas: Quotas
    preparing: Preparing
    leaving: Leaving
    watch: EngineWatch
    store: VerdictStore | None
    surface: Surface | None  # None: the engine is not vLLM
    certificates: CertificateWatch | None  # where there is a store
    metrics: Metrics  # of the first model; they share one page
    estimator: EstimatorKind
    request_timeout_s: float
    started: int  # Unix time, s
    renewal: Renewal
    replicas: Replicas | None = None  # where a PostgreSQL store is shared
    pinned: str | None = None

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """What answers now, by name."""
        return {name: slot.current for name, slot in self.slots.items()}

    def slot(self, name: str | None = None) -> Slot:
        """Returns the slot of that name, by default the first. Raises ModelNotFound."""
        if name is None and self.slots:
            return next(iter(self.slots.values()))
        if name is None or name not in self.slots:
            served = ", ".join(map(repr, self.slots)) or "none for this key"
            shown = ascii(name if name is None else name[:100])
            raise ModelNotFound(f"the model {shown} is not served here; this server has {served}")
        return self.slots[name]

    def model(self, name: str | None = None, bundle: str | None = None) -> ServedModel:
        """Returns what answers under that name now, by default the first. Call it once for each request.

        bundle: digest that the request's body pins. Raises ModelNotFound, BundleBehind, or AnotherBundle for a pin
        that does not fit.
        """
        slot = self.slot(name)
        current = slot.current
        for pinned in (self.pinned, bundle):
            if pinned is not None and pinned != current.bundle.digest:
                raise AnotherBundle(pinned, current.bundle.digest)
        if slot.behind is not None:
            raise BundleBehind(slot.behind)
        return current

    def note(self, model: ServedModel, given: Sequence[GivenVerdict], *, usual: bool) -> None:
        """Has verdicts that are about to be sent kept, and their prompts watched for drift.

        usual: the request kept to the policy. One that departs is said to, and drifts from nothing.
        """
        if model.drift is not None and usual:
            for one in given:
                if one.index == 0:  # each prompt once
                    model.drift.observe(one.verdict, one.caller)
        if self.store is not None:
            self.store.note(given)

    async def prepare(self, request: Request, bulk: Bulk, resolve: Callable[[], Resolved]) -> Resolved:
        """Returns the resolved request, charged to its key. resolve: runs off the event loop.

        Raises Overloaded, TooFast or Refused; a request for which no place is free costs nothing. The key is charged
        before the work is done, by the length of the texts, and then what they really come to.
        """
        caller, key = request.state.caller, request.state.key
        per_day = key.tokens_per_day if key else None
        if self.watch.starved:
            raise Overloaded(
                "the machine gives the engine too little processor time; try later or elsewhere",
                retry_after_s=10,
            )
        self.admission.check(caller, bulk.choices, 0)
        charged = max(1, bulk.characters // _CHARACTERS_PER_TOKEN)
        self.quotas.take(caller, charged, per_day)
        self.token_rate.take(caller, charged)
        resolved = await self.preparing.run(caller, bulk.characters, resolve)
        resolved = cast(Resolved, replace(cast(Any, resolved), caller=caller))
        self.admission.check(caller, bulk.choices, resolved.tokens)
        for account in (self.quotas, self.token_rate):
            account.settle(caller, resolved.tokens - charged)
        return resolved


class LifespanState(TypedDict):
    services: Services


def services_of(request: Request) -> Services:
    """Returns the services, with those models alone that the request's key may ask for."""
    services = cast(LifespanState, request.state)["services"]
    key: Key | None = request.state.key
    pinned = request.headers.get(PIN)
    if pinned is not None:
        services = replace(services, pinned=pinned)
    if key is None or key.models is None:
        return services
    return replace(
        services, slots={name: slot for name, slot in services.slots.items() if name in key.models}
    )


InjectedServices = Annotated[Services, Depends(services_of)]
"""FastAPI gives the services to a handler's parameter of this type."""
