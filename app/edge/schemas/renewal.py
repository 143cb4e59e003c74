"""Schemas of promoting a bundle, rolling it back, and of what shadows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.bundle import ShownShadow
from candor.app.edge.schemas.requests import Unicode


class RollbackRequest(FewFields):
    """model: name of a served model; null: the first."""

    model: Unicode | None = Field(default=None, max_length=1000)


class PromoteRequest(RollbackRequest):
    bundle: Unicode | None = Field(
        default=None,
        max_length=1000,
        description="Path, name or first digits of the digest of a bundle beside the configured one. Without it, the "
        "bundle that shadows.",
    )


class BundleInUse(BaseModel):
    """bundle: digest of what answers now. previous: what a rollback goes back to, as far as it is loaded."""

    object: Literal["bundle.in_use"] = "bundle.in_use"
    model: str
    bundle: str
    previous: str | None
    shadow: ShownShadow | None


class BundlesInUse(BaseModel):
    object: Literal["list"] = "list"
    data: list[BundleInUse]
