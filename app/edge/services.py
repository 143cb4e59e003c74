"""The services: the lifespan makes them, and every handler gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypedDict, TypeVar, cast

from fastapi import Depends, Request

from candor.app.answering.decisions import DecisionResolver, DecisionService
from candor.app.answering.preparing import Preparing
from candor.app.answering.request import Bulk
from candor.app.answering.waiting import EngineWatch
from candor.app.edge.keys import Key
from candor.app.edge.limits import Admission, Overloaded, RateLimit
from candor.app.edge.quotas import Quotas
from candor.app.feedback import FeedbackStore
from candor.app.process.ending import Leaving
from candor.app.process.selftest import SelfTest
from candor.app.telemetry.metrics import Metrics
from candor.engine.base import Engine
from candor.model_store.bundle import Bundle
from candor.policy.certificate import EstimatorKind, RuleKind

if TYPE_CHECKING:
    from candor.app.edge.routes.surface import Surface


class Charged(Protocol):
    """A resolved request. tokens: at most. caller: whose places it takes."""

    @property
    def tokens(self) -> int: ...

    @property
    def caller(self) -> str: ...


Resolved = TypeVar("Resolved", bound=Charged)

_CHARACTERS_PER_TOKEN = 4
"""To charge for a prompt before it is tokenised; afterwards the charge is corrected."""


class ModelNotFound(Exception):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name, with its bundle: the base model, or that model under an adapter.

    rule: by which its answers are let through.
    """

    name: str
    bundle: Bundle
    rule: RuleKind
    resolver: DecisionResolver
    service: DecisionService
    selftest: SelfTest
    metrics: Metrics


@dataclass(frozen=True)
class Services:
    """The objects that handlers use. models: by each name that they answer to; the first is the default."""

    engine: Engine
    models: Mapping[str, ServedModel]
    admission: Admission
    token_rate: RateLimit
    quotas: Quotas
    preparing: Preparing
    leaving: Leaving
    watch: EngineWatch
    feedback: FeedbackStore | None
    surface: Surface | None  # None: the engine is not vLLM
    metrics: Metrics  # of the first model; they share one page
    estimator: EstimatorKind
    request_timeout_s: float
    started: int  # Unix time, s

    def model(self, name: str | None = None) -> ServedModel:
        """Returns the model of that name, by default the first. Raises ModelNotFound."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name is None or name not in self.models:
            served = ", ".join(map(repr, self.models)) or "none for this key"
            shown = ascii(name if name is None else name[:100])
            raise ModelNotFound(f"the model {shown} is not served here; this server has {served}")
        return self.models[name]

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
    if key is None or key.models is None:
        return services
    allowed = {name: model for name, model in services.models.items() if name in key.models}
    return replace(services, models=allowed)


InjectedServices = Annotated[Services, Depends(services_of)]
"""FastAPI gives the services to a handler's parameter of this type."""
