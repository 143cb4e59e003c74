"""Review by people: the queues, labels, and the ticket of an answer.

GET  /v1/reliability/queue           what is to be labelled           scope review
POST /v1/reliability/labels          a label                          scope review
GET  /v1/reliability/answers/{id}    what became of an answer         scope answer, for whoever asked
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection

from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.review import (
    AnswerOutcome,
    LabelReceipt,
    LabelRequest,
    QueuedAnswer,
    ReviewQueue,
    ShownAgreement,
    Ticket,
)
from candor.app.edge.services import InjectedServices, Services
from candor.app.store import reading
from candor.app.store.records import Label, NoSuchAnswer
from candor.app.store.store import VerdictStore

router = APIRouter(route_class=BoundedRoute)


@router.get("/v1/reliability/queue", responses=ERRORS)
async def show_queue(
    request: Request,
    services: InjectedServices,
    kind: reading.Kind = "sampled",
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> ReviewQueue:
    """Answers to label: those drawn for an audit, or, apart from them, what was withheld, or what a shadowing bundle
    decides otherwise."""
    reviewer: str = request.state.caller

    def ask(connection: Connection) -> ReviewQueue:
        return ReviewQueue(
            kind=kind,
            reviewer=reviewer,
            waiting=reading.waiting(connection),
            agreement=[
                ShownAgreement(reviewers=both, answers=one.answers, share=one.share, kappa=one.kappa)
                for both, one in reading.agreements(connection).items()
            ],
            items=[
                QueuedAnswer(
                    id=row["id"],
                    index=row["choice"],
                    time=row["time"],
                    model=row["model"],
                    conversation=reading.conversation(row),
                    answer=row["answer"],
                    reviewers=row["reviewers"],
                    thumb=row["thumb"],
                )
                for row in reading.queue(connection, kind, reviewer, limit)
            ],
        )

    return await (await _store(services)).read(ask)


@router.post("/v1/reliability/labels", responses=ERRORS)
async def take_label(body: LabelRequest, request: Request, services: InjectedServices) -> LabelReceipt:
    """A reviewer's label. Acknowledged once it is durable; another one by the same reviewer replaces it."""
    label = Label(body.id, body.index, body.correct, request.state.caller, body.comment, body.answer)
    receipt = await (await _store(services)).label(label)
    if services.certificates is not None:
        services.certificates.wake()
    return LabelReceipt(id=body.id, index=body.index, correct=body.correct, outcome=receipt.outcome)


@router.get("/v1/reliability/answers/{id}", responses=ERRORS)
async def show_outcome(id: str, request: Request, services: InjectedServices) -> Ticket:
    """What became of an answer that this key asked for: its verdict, what reviewers said, and a person's answer."""
    store = await _store(services)
    found = await store.read(lambda connection: reading.outcome(connection, id))
    mine = [row for row in found if row["caller"] == request.state.caller]
    if not mine:
        raise NoSuchAnswer(f"no answer to this key has the id {id[:100]!a}; it may have been forgotten")
    results = [
        AnswerOutcome(
            index=row["choice"],
            region=row["region"],
            abstained=row["abstained"],
            reason=row["reason"],
            labelled=row["reviewers"] > 0,
            correct=row["correct"],
            answer=row["human_answer"],
        )
        for row in mine
    ]
    return Ticket(id=id, results=results)


async def _store(services: Services) -> VerdictStore:
    """Returns the store, with what this server gave until now in it."""
    if services.store is None:
        raise NoSuchAnswer("this server keeps no verdicts; its operator can set CANDOR_STORE")
    await services.store.written()
    return services.store
