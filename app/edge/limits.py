"""Who is let in: sizes that can be served, no more at once than can be waited for, and each its share.

A rate is a bucket that fills at it and holds one minute's worth:

    left(t) = min(rate, left(s) + rate (t - s) / 60),     let in where left(t) > 0

What is taken may exceed what is left: then the next waits until the debt is paid. So a request larger than a
minute's worth is served once and paid for, rather than never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from candor.app.process.settings import Settings


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


class TooFast(Overloaded):
    """A key has had its share for now."""


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
    """Counts the answers being written or waiting to be, and the tokens that they may come to."""

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self.in_flight = 0
        self.tokens = 0

    def check(self, choices: int, tokens: int) -> None:
        """Raises Overloaded where there are not enough places, Refused where there never will be."""
        at_most(self._most_tokens, tokens, "tokens in one request, answers at their longest", "max_tokens")
        if self.in_flight + choices > self._most or self.tokens + tokens > self._most_tokens:
            raise Overloaded(
                f"{self.in_flight} answers of up to {self.tokens} tokens are being written or waiting, the most "
                f"are {self._most} and {self._most_tokens}; try later",
                # Answers take from a fraction of a second to minutes: a short wait, and clients double it.
                retry_after_s=1,
            )

    @contextmanager
    def admit(self, choices: int, tokens: int) -> Iterator[None]:
        """Holds the places of one request. tokens: of its prompts, and the most that its answers may have.

        Raises what `check` raises.
        """
        self.check(choices, tokens)
        self.in_flight += choices
        self.tokens += tokens
        try:
            yield
        finally:
            self.in_flight -= choices
            self.tokens -= tokens


class RateLimit:
    """A rate a minute for each caller; None for no limit. unit: what is counted."""

    def __init__(self, per_minute: int | None, unit: str, clock: Callable[[], float] = monotonic) -> None:
        self._rate = per_minute
        self._unit = unit
        self._clock = clock  # monotonic: a clock that is set lets nobody in, and keeps nobody out
        self._buckets: dict[str, tuple[float, float]] = {}  # caller: what was left, when

    def take(self, caller: str, amount: int = 1) -> None:
        """Raises TooFast where nothing is left; then nothing is taken."""
        if self._rate is None:
            return
        now = self._clock()
        left, then = self._buckets.get(caller, (float(self._rate), now))
        left = min(self._rate, left + self._rate * (now - then) / 60)
        one = min(1.0, float(amount))
        if left < one:
            wait = math.ceil((one - left) * 60 / self._rate)
            raise TooFast(
                f"at most {self._rate} {self._unit} a minute for each key; try in {wait} s", max(wait, 1)
            )
        self._buckets[caller] = (left - amount, now)
