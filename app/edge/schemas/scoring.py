"""Schemas of `POST /v1/reliability`, which scores a given prompt and response."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.reliability import ReliabilityObject
from candor.app.edge.schemas.requests import Messages, Unicode


class ScoreRequest(FewFields):
    """Either messages or a plain prompt, and the response to score.

    The verdict holds for a response that the served model gave under the calibrated policy.
    """

    model: str | None = None
    messages: Messages | None = None
    prompt: Unicode | None = None
    response: Unicode
    alpha: float | None = Field(default=None, allow_inf_nan=False)
    certified: bool | None = None
    exemplars: int = Field(default=0, ge=0)
    bundle: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="Digest of the bundle that is to judge."
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise PydanticCustomError("prompt", "expected either messages or prompt, and not both")
        return self


class ScoreResponse(BaseModel):
    id: str
    object: Literal["reliability"] = "reliability"
    model: str
    system_fingerprint: str
    reliability: ReliabilityObject
