"""Who is let in: sizes that can be served, and no more at once than can be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.settings import Settings


class Refused(Exception):
    """A request that this server will not do. param: the field at fault, as a path."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(Exception):
    """Too much is waiting already; come back in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Limits:
    """Sizes that a request may have."""

    prompt_tokens: int
    output_tokens: int
    choices: int
    exemplars: int

    @classmethod
    def of(cls, settings: Settings, max_model_len: int) -> Limits:
        return cls(
            prompt_tokens=min(settings.max_prompt_tokens or max_model_len, max_model_len),
            output_tokens=min(settings.max_output_tokens or max_model_len, max_model_len),
            choices=settings.max_choices,
            exemplars=settings.max_exemplars,
        )


def at_most(limit: int, value: int, what: str, param: str) -> None:
    """Raises Refused where `value` is above `limit`."""
    if value > limit:
        raise Refused(f"{what}: at most {limit} on this server, got {value}", param, "too_large")


class Admission:
    """Counts the answers being written or waiting to be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.in_flight = 0

    @contextmanager
    def admit(self, choices: int) -> Iterator[None]:
        """Holds the places of one request. Raises Overloaded where there are not enough."""
        if self.in_flight + choices > self._most:
            raise Overloaded(
                f"{self.in_flight} answers are being written or waiting, the most is {self._most}; try later",
                # Answers take from a fraction of a second to minutes: a short wait, and clients double it.
                retry_after_s=1,
            )
        self.in_flight += choices
        try:
            yield
        finally:
            self.in_flight -= choices
