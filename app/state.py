"""What the lifespan makes and every handler gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request

from app.admission import Admission, RateLimit
from app.desk import OrderDesk
from app.feedback import FeedbackStore
from app.golden import Golden
from app.metrics import Metrics
from app.policy import EstimatorKind
from app.service import AnswerService
from app.watch import EngineWatch
from engine.base import Engine
from model_store.bundle import Bundle


@dataclass(frozen=True)
class Services:
    engine: Engine
    bundle: Bundle
    desk: OrderDesk
    service: AnswerService
    admission: Admission
    token_rate: RateLimit
    watch: EngineWatch
    golden: Golden
    feedback: FeedbackStore | None
    metrics: Metrics
    estimator: EstimatorKind
    request_timeout_s: float
    started: int  # seconds since 1970


class LifespanState(TypedDict):
    services: Services


async def _services(request: Request) -> Services:
    return cast(LifespanState, request.state)["services"]


Given = Annotated[Services, Depends(_services)]
"""A handler's parameter of this type is given the services."""
