"""Schemas of `POST /v1/reliability/feedback`: a label that says whether an earlier answer was right."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.requests import INT64, Unicode
from candor.policy.decision import RegionName


class FeedbackRequest(FewFields):
    """The comment is kept as it is: put nothing into it that must not be kept."""

    id: Unicode = Field(max_length=200, description="The response's `id`.")
    index: int = Field(default=0, ge=0, lt=INT64, description="Of the choice.")
    correct: bool = Field(description="Whether the answer follows its instruction.")
    comment: Unicode | None = Field(default=None, max_length=4000)


class FeedbackReceipt(BaseModel):
    """It is on the disk. outcome: `unchanged` where the same was said before, `replaced` where another was."""

    object: Literal["reliability.feedback"] = "reliability.feedback"
    id: str
    index: int
    correct: bool
    region: RegionName
    outcome: Literal["recorded", "unchanged", "replaced"]
