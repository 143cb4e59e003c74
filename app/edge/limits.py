"""Limits on requests: their sizes, the answers in flight at once, and the rate of each key.

A rate limit is a token bucket that holds one minute's worth of the rate:

    left(t) = min(rate, left(s) + rate (t - s) / 60),     admitted if left(t) >= 1

A request may take more than is left; the next one then waits until the debt is paid. So a request larger than
one minute's worth is served and paid for afterwards, rather than never served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
    """A key has exceeded its rate, its quota or its share of the places."""


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


def few_logprobs(limit: int, each: int, tokens: int) -> None:
    """Raises Refused for more log-probabilities in a request. each: of a token; tokens: of all answers."""
    what = "log-probabilities in one request (answers, tokens, each's)"
    at_most(limit, each * tokens, what, "logprobs")


class Admission:
    """Counts answers in flight (running or waiting) and their tokens, prompts and longest answers.

    Half of both is shared out among the keys by their weight, and a key's unused part is kept for it; the other half
    is for whoever comes first:

        sure(k) = most / 2 * weight(k) / sum of weights
        admitted if amount <= free, and held(k) + amount <= sure(k) or free - amount >= what is kept for others

    weights: of all keys that may ask, by name. With fewer than two, whoever comes first gets everything.
    """

    def __init__(
        self, most: int, most_tokens: int, weights: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._most = (most, most_tokens)
        self._weights = weights
        self._held: dict[str, tuple[int, int]] = {}  # caller: (answers, tokens)

    @property
    def in_flight(self) -> int:
        return sum(answers for answers, _ in self._held.values())

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self._held.values())

    def alone(self) -> bool:
        """Returns whether there is nobody to share with."""
        return len(self._weights()) < 2

    def check(self, caller: str, choices: int, tokens: int) -> None:
        """Raises Overloaded if the request does not fit now, TooFast if only others' share is left, and Refused if
        it can never fit."""
        at_most(self._most[1], tokens, "tokens in one request, answers at their longest", "max_tokens")
        wanted, free = (choices, tokens), (self._most[0] - self.in_flight, self._most[1] - self.tokens)
        if any(amount > left for amount, left in zip(wanted, free, strict=True)):
            raise Overloaded(
                f"{self.in_flight} answers of up to {self.tokens} tokens are being written or waiting, the most "
                f"are {self._most[0]} and {self._most[1]}; try later",
                # Answers take from a fraction of a second to minutes: start short, since clients double the wait.
                retry_after_s=1,
            )
        if self.alone():
            return
        weights = self._weights()
        total = sum(weights.values())
        for kind, (most, amount, left) in enumerate(zip(self._most, wanted, free, strict=True)):
            unused = {
                name: most / 2 * weight / total - self._held.get(name, (0, 0))[kind]
                for name, weight in weights.items()
            }
            kept = sum(max(0.0, part) for name, part in unused.items() if name != caller)
            if amount > unused.get(caller, 0.0) and left - amount < kept:
                own, what = self._held.get(caller, (0, 0))[kind], ("answers", "tokens")[kind]
                raise TooFast(
                    f"this key has {own} {what} in flight, and what is left is kept for others; try later",
                    retry_after_s=1,
                )

    @contextmanager
    def admit(self, caller: str, choices: int, tokens: int) -> Iterator[None]:
        """Counts one request as in flight. tokens: those of its prompts and of its longest answers.

        Raises what `check` raises.
        """
        self.check(caller, choices, tokens)
        self._hold(caller, choices, tokens)
        try:
            yield
        finally:
            self._hold(caller, -choices, -tokens)

    def _hold(self, caller: str, choices: int, tokens: int) -> None:
        held = self._held.pop(caller, (0, 0))
        if (now := (held[0] + choices, held[1] + tokens)) != (0, 0):
            self._held[caller] = now


class RateLimit:
    """A limit per minute for each caller. per_minute: None sets no limit. unit: what is counted.

    Where several replicas count together, `unsent` is told to all, and `told` has what is left of that.
    """

    def __init__(self, per_minute: int | None, unit: str, clock: Callable[[], float] = monotonic) -> None:
        self.per_minute = per_minute
        self.unit = unit
        self._clock = clock  # monotonic: setting the system clock has no effect
        self._buckets: dict[str, tuple[float, float]] = {}  # caller: (left, time in s)
        self._unsent: dict[str, float] = {}
        self._seen: dict[str, float] = {}  # caller: when it last came, s

    def take(self, caller: str, amount: int = 1) -> None:
        """Takes `amount` from the caller's bucket. Raises TooFast, and takes nothing, if nothing is left."""
        if self.per_minute is None:
            return
        now = self._clock()
        self._seen[caller] = now
        left, then = self._buckets.get(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + self.per_minute * (now - then) / 60)
        one = min(1.0, float(amount))
        if left < one:
            wait = math.ceil((one - left) * 60 / self.per_minute)
            raise TooFast(
                f"at most {self.per_minute} {self.unit} a minute for each key; try in {wait} s", max(wait, 1)
            )
        self._buckets[caller] = (left - amount, now)
        self._unsent[caller] = self._unsent.get(caller, 0.0) + amount

    def settle(self, caller: str, amount: int) -> None:
        """Corrects what `take` took by `amount`, which may be negative. Raises nothing."""
        if caller in self._buckets:
            left, then = self._buckets[caller]
            self._buckets[caller] = (left - amount, then)
            self._unsent[caller] = self._unsent.get(caller, 0.0) + amount

    def unsent(self) -> dict[str, float]:
        """Returns what was taken since the last call, by caller; 0 for one that came within a minute and took
        nothing, for others may have let it."""
        now = self._clock()
        self._seen = {caller: then for caller, then in self._seen.items() if now - then < 60}
        unsent, self._unsent = dict.fromkeys(self._seen, 0.0) | self._unsent, {}
        return unsent

    def put_back(self, unsent: Mapping[str, float]) -> None:
        """What could not be told is told later."""
        for caller, amount in unsent.items():
            self._unsent[caller] = self._unsent.get(caller, 0.0) + amount

    def told(self, left: Mapping[str, float]) -> None:
        """Takes over what is left to each caller, less what it took here since `unsent`."""
        now = self._clock()
        for caller, amount in left.items():
            self._buckets[caller] = (amount - self._unsent.get(caller, 0.0), now)
