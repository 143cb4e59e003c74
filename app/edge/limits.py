"""Limits on requests: their sizes, the answers in flight at once, and the rate of each key.

A rate limit is a token bucket that holds one minute's worth of the rate:

    left(t) = min(rate, left(s) + rate (t - s) / 60),     admitted if left(t) >= 1

A request may take more than is left; the next one then waits until the debt is paid. So a request larger than
one minute's worth is served and paid for afterwards, rather than never served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from candor.app.process.settings import Settings


class Refused(Exception):
    """This server never serves such a request. param: path of the field at fault."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(Exception):
    """Too many answers are in flight; the client should retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooFast(Overloaded):
    """A key has exceeded its rate."""


@dataclass(frozen=True)
class Limits:
    """Maximum sizes of a request."""

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
    """Raises Refused if `value` is above `limit`."""
    if value > limit:
        raise Refused(f"{what}: at most {limit} on this server, got {value}", param, "too_large")


class Admission:
    """Counts answers in flight (running or waiting) and their tokens, prompts and longest answers."""

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self.in_flight = 0
        self.tokens = 0

    def check(self, choices: int, tokens: int) -> None:
        """Raises Overloaded if the request does not fit now, and Refused if it can never fit."""
        at_most(self._most_tokens, tokens, "tokens in one request, answers at their longest", "max_tokens")
        if self.in_flight + choices > self._most or self.tokens + tokens > self._most_tokens:
            raise Overloaded(
                f"{self.in_flight} answers of up to {self.tokens} tokens are being written or waiting, the most "
                f"are {self._most} and {self._most_tokens}; try later",
                # Answers take from a fraction of a second to minutes: start short, since clients double the wait.
                retry_after_s=1,
            )

    @contextmanager
    def admit(self, choices: int, tokens: int) -> Iterator[None]:
        """Counts one request as in flight. tokens: those of its prompts and of its longest answers.

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
    """A limit per minute for each caller. per_minute: None sets no limit. unit: what is counted."""

    def __init__(self, per_minute: int | None, unit: str, clock: Callable[[], float] = monotonic) -> None:
        self._rate = per_minute
        self._unit = unit
        self._clock = clock  # monotonic: setting the system clock has no effect
        self._buckets: dict[str, tuple[float, float]] = {}  # caller: (left, time in s)

    def take(self, caller: str, amount: int = 1) -> None:
        """Takes `amount` from the caller's bucket. Raises TooFast, and takes nothing, if nothing is left."""
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
