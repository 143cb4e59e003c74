"""`POST /v1/decisions`: typed questions about one input, each answered or refused."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from candor.app.answering.decisions import Decision
from candor.app.answering.request import Reliability
from candor.app.answering.scoring import ScoringRequest
from candor.app.answering.shadow import Sent
from candor.app.answering.waiting import Deadline, seconds_for, unless_interrupted
from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas import decisions as schema
from candor.app.edge.schemas.reliability import ReliabilityObject, ReliabilityResult
from candor.app.edge.services import InjectedServices
from candor.app.store.records import GivenVerdict
from candor.app.telemetry.audit import audited
from candor.app.writing.bodies import fingerprint, verdict_result
from candor.engine.base import Representation

router = APIRouter(route_class=BoundedRoute)

_MEASURED = (
    "prediction",
    "probability",
    "sdm_probability",
    "probability_lower",
    "probability_upper",
    "magnitude",
)


@router.post("/v1/decisions", response_model=schema.DecisionResponse, responses=ERRORS)
async def decide(body: schema.DecisionRequest, request: Request, services: InjectedServices) -> Response:
    """Answers to 1 to 400 questions about one input, each with its reliability."""
    model = services.model(body.model)
    record = audited(request, model.name, model.bundle.digest)
    bulk = model.resolver.measure_decisions(body)
    deadline = Deadline(seconds_for(request, services.request_timeout_s))
    preparation = services.prepare(request, bulk, lambda: model.resolver.decisions(body))
    wanted = await unless_interrupted(preparation, request.receive, services.watch, deadline.left_s)
    deciding = model.service.decide(wanted)
    decisions = await unless_interrupted(deciding, request.receive, services.watch, deadline.left_s)
    response_id = f"dec-{uuid.uuid4().hex}"
    verdicts = [(at, one.judged.verdict) for at, one in enumerate(decisions) if one.judged]
    record.verdicts += verdicts
    given = [
        GivenVerdict(
            response_id, at, verdict, model.bundle.digest, model.name, model.rule, request.state.caller
        )
        for at, verdict in verdicts
    ]
    services.note(model, given, usual=all(one.verdict.calibrated for one in given))
    if model.shadow is not None:
        model.shadow.offer(
            *_sent(response_id, decisions, wanted.reliability, model.bundle.manifest.representation)
        )

    def written() -> str:
        response = schema.DecisionResponse(
            id=response_id,
            created=int(time.time()),
            model=model.name,
            answers=[_answer(decision) for decision in decisions],
            usage=schema.DecisionUsage(input_tokens=wanted.tokens, total_tokens=wanted.tokens),
            system_fingerprint=fingerprint(model.bundle.digest),
            reliability=_reliability(decisions),
        )
        return response.model_dump_json(exclude={"reliability"} if response.reliability is None else None)

    return Response(await asyncio.to_thread(written), media_type="application/json")


def _sent(
    response_id: str, decisions: list[Decision], asked: Reliability, representation: Representation
) -> Iterator[Sent]:
    """Yields what a shadow scores too."""
    for at, one in enumerate(decisions):
        if one.judged is not None:
            verdict, decided = one.judged.verdict, one.decided
            summary, states = decided.summary(representation), decided.reading.states
            scoring = ScoringRequest(
                summary, asked.alpha, verdict.calibrated, asked.certified_only, 0, states
            )
            yield Sent(response_id, at, verdict, scoring)


def _answer(
    decision: Decision,
) -> schema.PredicateAnswer | schema.ChoiceAnswer | schema.ScoreAnswer | schema.RefusalAnswer:
    decided, question = decision.decided, decision.decided.asked.question
    if decision.withheld:
        return schema.RefusalAnswer(name=question.name)
    shares, chosen = decision.probabilities, decided.choice
    if question.type == "predicate":
        return schema.PredicateAnswer(name=question.name, probability=shares[0])
    if question.type == "choice":
        return schema.ChoiceAnswer(
            name=question.name,
            choice=question.options[chosen].value,
            confidence=shares[chosen],
            probabilities=[
                schema.ChoiceProbability(value=option.value, probability=share)
                for option, share in zip(question.options, shares, strict=True)
            ],
        )
    return schema.ScoreAnswer(
        name=question.name,
        score=sum(value * share for value, share in enumerate(shares)),
        confidence=shares[chosen],
        probabilities=[
            schema.LevelProbability(label=option.text, value=value, probability=share)
            for value, (option, share) in enumerate(zip(question.options, shares, strict=True))
        ],
    )


def _reliability(decisions: list[Decision]) -> ReliabilityObject | None:
    results = [_result(at, one) for at, one in enumerate(decisions) if one.judged is not None]
    return ReliabilityObject(results=results) if results else None


def _result(index: int, decision: Decision) -> ReliabilityResult:
    """A refused answer's probabilities are withheld here too: with two options, they would all but tell it."""
    assert decision.judged is not None  # the caller checks this
    result = verdict_result(index, decision.judged)
    if not decision.withheld:
        return result
    rule = result.rule and replace(result.rule, probability=None)
    return result.model_copy(update=dict.fromkeys(_MEASURED) | {"rule": rule})
