"""Escalation: what is withheld here is put to another model, and the client gets its answer.

    kept back     not asked: over the key's budget, too many asked already, circuit open, nothing certified
    asked         one try after another while the upstream is away or busy, within what is left of the request's time
    answered      its text, in pieces as they come, then `Escalated`
    otherwise     nothing more: the client gets the ordinary refusal

The upstream gets the conversation and the length of the answer, never the client's key, and nothing of what was
written here. An upstream that is down costs little: after `failures` in a row the circuit opens, and nobody waits for
it; after `pause_s` one request tries again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import urlsplit

from candor.app.answering.waiting import Deadline
from candor.app.edge.limits import Refused, TooFast
from candor.app.edge.quotas import Quotas
from candor.policy.cascade import CascadeCertificate, CascadeTerms
from candor.policy.upstream import Asked, Ended, Upstream, UpstreamError

if TYPE_CHECKING:
    from candor.app.process.settings import Settings
    from candor.app.telemetry.metrics import Metrics

logger = logging.getLogger("candor")

Outcome = Literal[
    "answered",
    "cancelled",
    "budget",
    "busy",
    "open",
    "uncertified",
    "withheld",
    "rejected",
    "unavailable",
    "timeout",
    "invalid",
]
"""cancelled: the client left. budget: the key's is used up. busy: too many are asked at once. open: the circuit is.
uncertified: only certified answers count, and no certificate would cover it. The others: `upstream.Failure`."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_MARGIN_S = 0.5
"""Kept of a request's time, so that a refusal still reaches the client."""
_FIRST_PAUSE_S = 0.25


@dataclass(frozen=True)
class UpstreamQuestion:
    """What is put to the upstream for one withheld answer. tokens: of its prompt, as this server counts.

    calibrated: whether the request keeps to the policy. certified_only: whether only certified answers count.
    streamed: whether the pieces are passed on as they come. deadline: the request's own; None: it has none.
    """

    asked: Asked
    tokens: int
    max_tokens: int
    alpha: float
    calibrated: bool
    certified_only: bool
    streamed: bool
    caller: str
    deadline: Deadline | None = None


@dataclass(frozen=True)
class Escalated:
    """An upstream's whole answer. model: the name that it was asked by. prompt_tokens, completion_tokens: by its own
    count, None if it gave none. certificate: of the cascade; None: nothing is promised of this answer."""

    model: str
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int | None
    completion_tokens: int | None
    certificate: CascadeCertificate | None


class Circuit:
    """Keeps requests from an upstream that fails.

    closed -> `most` failures in a row -> open -> `pause_s` later half-open: one may ask -> closed, or open again
    """

    def __init__(self, most: int, pause_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._most = most
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._opened = 0.0
        self._trying = False

    @property
    def level(self) -> int:
        """0: closed, 1: half-open, 2: open."""
        if self._failures < self._most:
            return 0
        return 1 if self._clock() - self._opened >= self._pause_s else 2

    def enter(self) -> bool:
        """Returns whether the caller may ask. It then says with `leave` what came of it."""
        if self.level == 0:
            return True
        if self.level == 2 or self._trying:
            return False
        self._trying = True
        return True

    def leave(self, failed: bool | None) -> None:
        """failed: None if nothing was learnt of the upstream."""
        self._trying = False
        if failed:
            self._failures += 1
            self._opened = self._clock()
        elif failed is False:
            self._failures = 0


class Escalation:
    """Asks one upstream for all served models; `of` gives each its own certificates and metrics."""

    def __init__(self, settings: Settings, upstream: Upstream, quotas: Quotas, metrics: Metrics) -> None:
        self._settings = settings
        self._upstream = upstream
        self._client = upstream.client(settings.escalate_concurrency)
        self._places = asyncio.Semaphore(settings.escalate_concurrency)
        self._circuit = Circuit(settings.escalate_failures, settings.escalate_pause_s)
        self._quotas = quotas
        self._metrics = metrics
        self._terms: CascadeTerms | None = None

    def of(self, terms: CascadeTerms | None, metrics: Metrics) -> Escalation:
        """Returns the same for one served model. terms: its bundle's cascade; None: nothing is certified of one."""
        other = copy(self)
        other._terms, other._metrics = terms, metrics
        metrics.escalates(lambda: self._circuit.level)
        return other

    async def close(self) -> None:
        await self._client.aclose()

    async def answer(self, question: UpstreamQuestion) -> Escalated | None:
        """Returns the upstream's whole answer; None if the ordinary refusal holds."""
        async with aclosing(self.pieces(question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Escalated):
                    return piece
        return None

    async def pieces(self, question: UpstreamQuestion) -> AsyncGenerator[str | Escalated, None]:
        """Yields the answer's text in pieces, then `Escalated` as the last item.

        Without that item the ordinary refusal holds, also after pieces of a text that broke off. Raises nothing.
        """
        certificate = self._certificate(question)
        outcome, began = self._kept_back(question, certificate), monotonic()
        if outcome is not None:
            self._metrics.escalated(outcome)
            return
        charged = question.tokens + question.max_tokens
        within_s = self._within_s(question)
        text: list[str] = []
        outcome = "cancelled"
        try:
            async with self._places, aclosing(self._told(question, within_s)) as told:
                async for one in told:
                    if isinstance(one, Ended):
                        used = (one.prompt_tokens, one.completion_tokens)
                        if None not in used:
                            self._settle(question, sum(filter(None, used)) - charged)
                        outcome = "answered"
                        self._metrics.escalated_tokens(*used)
                        yield Escalated(
                            self._upstream.model, "".join(text), one.finish_reason, *used, certificate
                        )
                        return
                    text.append(one)
                    yield one
        except UpstreamError as error:
            outcome = error.failure
            logger.warning("the upstream gave no answer (%s): %s", outcome, error)
            if not text:
                self._settle(question, -charged)
        finally:
            # A client that gives little time could otherwise open the circuit for everybody.
            slow = outcome == "timeout" and within_s == self._settings.escalate_timeout_s
            learnt_nothing = outcome == "cancelled" or (outcome == "timeout" and not slow)
            self._circuit.leave(None if learnt_nothing else outcome in ("unavailable", "invalid", "timeout"))
            self._metrics.escalated(outcome, monotonic() - began)

    async def _told(self, question: UpstreamQuestion, within_s: float) -> AsyncGenerator[str | Ended, None]:
        """Asks until it is answered. Only what is away or busy, and said nothing yet, is asked again."""
        until, pause_s = asyncio.get_running_loop().time() + within_s, _FIRST_PAUSE_S
        for tries_left in reversed(range(self._settings.escalate_retries + 1)):
            begun = False
            asking = self._upstream.ask(
                self._client, question.asked, question.max_tokens, until, streamed=question.streamed
            )
            try:
                async with aclosing(asking):
                    async for one in asking:
                        begun = True
                        yield one
                return
            except UpstreamError as error:
                wait_s = max(pause_s * random.uniform(0.5, 1), error.retry_after_s)
                late = asyncio.get_running_loop().time() + wait_s >= until
                if error.failure != "unavailable" or begun or late or not tries_left:
                    raise
            await asyncio.sleep(wait_s)
            pause_s *= 2

    def _certificate(self, question: UpstreamQuestion) -> CascadeCertificate | None:
        if self._terms is None:
            return None
        return self._terms.covering(
            self._upstream.model, question.alpha, question.max_tokens, calibrated=question.calibrated
        )

    def _kept_back(
        self, question: UpstreamQuestion, certificate: CascadeCertificate | None
    ) -> Outcome | None:
        """Returns why the upstream is not asked. None: it is, the budget is charged and the circuit entered."""
        if question.certified_only and (certificate is None or certificate.lower_bound < question.alpha):
            return "uncertified"
        if self._within_s(question) <= 0:
            return "timeout"
        if self._places.locked():
            return "busy"
        if not self._circuit.enter():
            return "open"
        try:
            self._charge(question)
        except TooFast:
            self._circuit.leave(None)
            return "budget"
        return None

    def _within_s(self, question: UpstreamQuestion) -> float:
        most = self._settings.escalate_timeout_s
        return most if question.deadline is None else min(most, question.deadline.left_s - _MARGIN_S)

    def _charge(self, question: UpstreamQuestion) -> None:
        """Raises TooFast if the key has used up what it may ask of the upstream today."""
        limits, tokens = self._settings, question.tokens + question.max_tokens
        self._quotas.take(self._account("tokens", question), tokens, limits.escalate_tokens_per_day)
        try:
            self._quotas.take(self._account("requests", question), 1, limits.escalate_requests_per_day)
        except TooFast:
            self._settle(question, -tokens)
            raise

    def _settle(self, question: UpstreamQuestion, tokens: int) -> None:
        self._quotas.settle(self._account("tokens", question), tokens)

    @staticmethod
    def _account(unit: str, question: UpstreamQuestion) -> str:
        return f"escalated {unit} {question.caller}"  # no key's name has a space


def upstream_of(settings: Settings) -> Upstream | None:
    """Returns the operator's upstream; None if there is none. Raises Refused if it cannot be asked."""
    if settings.escalate_url is None or settings.escalate_model is None:
        return None
    try:
        upstream = Upstream(settings.escalate_url, settings.escalate_model, settings.escalate_key_file)
    except (OSError, ValueError) as error:
        raise Refused(f"CANDOR_ESCALATE_URL, _MODEL, _KEY_FILE: {error}", "CANDOR_ESCALATE_URL") from error
    url = urlsplit(upstream.url)
    if url.scheme == "http" and url.hostname not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("what is escalated goes to %s without encryption", url.hostname)
    return upstream
