"""Schemas of review: the queues, a reviewer's label, and what became of an answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.requests import INT64, Unicode
from candor.policy.decision import RegionName


class QueuedAnswer(BaseModel):
    """An answer to label. Its verdict is not shown: who sees it labels otherwise.

    conversation: turns, or a plain prompt; it and answer are null where no texts are kept. reviewers: who labelled it
    already. thumb: what a client said of it.
    """

    id: str
    index: int
    time: float
    model: str
    conversation: Any
    answer: str | None
    reviewers: int
    thumb: bool | None


class ShownAgreement(BaseModel):
    """Of two reviewers, on answers that both labelled. kappa: Cohen's; null where it has no value."""

    reviewers: tuple[str, str]
    answers: int
    share: float | None
    kappa: float | None


class ReviewQueue(BaseModel):
    """waiting: answers without any label, by queue; of sampled and withheld ones, those that were drawn. items: what
    this reviewer has not labelled."""

    object: Literal["reliability.queue"] = "reliability.queue"
    kind: Literal["sampled", "withheld", "disputed"]
    reviewer: str
    waiting: dict[Literal["sampled", "withheld", "disputed"], int]
    agreement: list[ShownAgreement]
    items: list[QueuedAnswer]


class LabelRequest(FewFields):
    id: Unicode = Field(max_length=200, description="The response's `id`.")
    index: int = Field(default=0, ge=0, lt=INT64, description="Of the choice.")
    correct: bool | None = Field(description="Whether the answer follows its instruction; null: cannot tell.")
    comment: Unicode | None = Field(default=None, max_length=4000)
    answer: Unicode | None = Field(
        default=None,
        max_length=100_000,
        description="What you answer in its place; whoever asked can fetch it.",
    )


class LabelReceipt(BaseModel):
    """It is durable. outcome: as of feedback, for labels of this reviewer."""

    object: Literal["reliability.label"] = "reliability.label"
    id: str
    index: int
    correct: bool | None
    outcome: Literal["recorded", "unchanged", "replaced"]


class AnswerOutcome(BaseModel):
    """What became of one choice. labelled: a reviewer looked at it. correct: what all reviewers say who can tell;
    null where they differ or none can. answer: what a person answers in its place."""

    index: int
    region: RegionName
    abstained: bool
    reason: str | None
    labelled: bool
    correct: bool | None
    answer: str | None


class Ticket(BaseModel):
    object: Literal["reliability.outcome"] = "reliability.outcome"
    id: str
    results: list[AnswerOutcome]
