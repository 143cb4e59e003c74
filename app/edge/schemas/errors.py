"""OpenAI's error body, the same for every error."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

ErrorType = Literal["invalid_request_error", "server_error"]


class Error(BaseModel):
    """param: path of the field at fault, for example `messages[0].content`. code: for programs."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error
