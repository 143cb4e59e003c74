"""`POST /v1/reliability/feedback`: a label for an answer given earlier."""

from __future__ import annotations

from fastapi import APIRouter, Request

from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS
from candor.app.edge.schemas.feedback import FeedbackReceipt, FeedbackRequest
from candor.app.edge.services import InjectedServices
from candor.app.store.records import Feedback, NoSuchAnswer

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/reliability/feedback", responses=ERRORS)
async def take_feedback(
    body: FeedbackRequest, request: Request, services: InjectedServices
) -> FeedbackReceipt:
    """Acknowledged once it is on the disk. Counted once for each answer, by the first that comes."""
    if services.store is None:
        raise NoSuchAnswer("this server keeps no feedback; its operator can set CANDOR_STORE")
    receipt = await services.store.take(
        Feedback(body.id, body.index, body.correct, body.comment, request.state.caller)
    )
    if receipt.outcome == "recorded":
        first, *others = services.models.values()
        # An earlier bundle may not be loaded any more.
        judge = next((one for one in others if one.bundle.digest == receipt.judged.bundle), first)
        judge.metrics.feedback(receipt.judged, body.correct)
    return FeedbackReceipt(
        id=body.id,
        index=body.index,
        correct=body.correct,
        region=receipt.judged.region,
        outcome=receipt.outcome,
    )
