"""The services: the lifespan makes them, and every handler gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request

from candor.app.answering.request import RequestResolver
from candor.app.answering.service import AnswerService
from candor.app.answering.waiting import EngineWatch
from candor.app.edge.limits import Admission, RateLimit
from candor.app.feedback import FeedbackStore
from candor.app.process.selftest import SelfTest
from candor.app.telemetry.metrics import Metrics
from candor.engine.base import Engine
from candor.model_store.bundle import Bundle
from candor.policy.certificate import EstimatorKind, RuleKind


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
    resolver: RequestResolver
    service: AnswerService
    selftest: SelfTest
    metrics: Metrics


@dataclass(frozen=True)
class Services:
    """The objects that handlers use. models: by name; the first is the default."""

    engine: Engine
    models: Mapping[str, ServedModel]
    admission: Admission
    token_rate: RateLimit
    watch: EngineWatch
    feedback: FeedbackStore | None
    estimator: EstimatorKind
    request_timeout_s: float
    started: int  # Unix time, s

    def model(self, name: str | None = None) -> ServedModel:
        """Returns the model of that name, by default the first. Raises ModelNotFound."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            served = ", ".join(map(repr, self.models))
            raise ModelNotFound(f"the model {name!a} is not served here; this server has {served}")
        return self.models[name]


class LifespanState(TypedDict):
    services: Services


async def _services(request: Request) -> Services:
    return cast(LifespanState, request.state)["services"]


InjectedServices = Annotated[Services, Depends(_services)]
"""FastAPI gives the services to a handler's parameter of this type."""
