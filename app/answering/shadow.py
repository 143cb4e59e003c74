"""A shadow: a second bundle that scores each answer too, and decides nothing.

    answer sent -> offer -> bounded queue -> score -> matrix of decisions, old x new
                                                   -> where they differ, the verdict in the store is flagged

The states are there already. What is offered while too much waits is dropped and counted, so a slow shadow never
holds up an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from candor.app.answering.scoring import Scorer, ScoringFailed, ScoringRequest
from candor.model_store.bundle import Bundle
from candor.policy.decision import Verdict

logger = logging.getLogger("candor")

Decision = Literal["answered", "abstained"]
ShadowDecision = Literal["answered", "abstained", "unknown"]
"""unknown: it could not be scored, or its prompt was refused unwritten and the shadow would have it answered."""
DECISIONS: tuple[Decision, ...] = get_args(Decision)
SHADOW_DECISIONS: tuple[ShadowDecision, ...] = get_args(ShadowDecision)

MOST_WAITING = 256
"""Answers that wait for the shadow; further ones are dropped."""


@dataclass(frozen=True)
class Sent:
    """An answer that was sent. index: of the choice. scoring: as the first bundle was asked, without exemplars."""

    id: str
    index: int
    verdict: Verdict
    scoring: ScoringRequest


class Seen(NamedTuple):
    """What the shadow decided of an answer."""

    sent: Sent
    old: Decision
    new: ShadowDecision

    @property
    def differs(self) -> bool:
        return self.new != "unknown" and self.new != self.old


class Shadow:
    """bundle: the one that shadows. tell: is told of each answer that it saw; None: one was dropped."""

    def __init__(
        self,
        bundle: Bundle,
        scorer: Scorer,
        tell: Callable[[Seen | None], None],
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.bundle = bundle
        self.matrix: Counter[tuple[Decision, ShadowDecision]] = Counter()
        self.dropped = 0
        self.scorer = scorer
        self._tell = tell
        self._most = most_waiting
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, *answers: Sent) -> None:
        """Takes answers that were sent, or drops them. It never waits."""
        for sent in answers:
            if len(self._running) >= self._most:
                self.dropped += 1
                self._tell(None)
                continue
            task = asyncio.create_task(self._see(sent))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        for task in tuple(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _see(self, sent: Sent) -> None:
        old: Decision = "abstained" if sent.verdict.abstained else "answered"
        try:
            new = await self._decide(sent.scoring)
        except Exception:
            logger.exception("the shadow failed")
            new = "unknown"
        self.matrix[old, new] += 1
        self._tell(Seen(sent, old, new))

    async def _decide(self, asked: ScoringRequest) -> ShadowDecision:
        if asked.hidden is None and asked.prompt is not None:  # refused when prefill ended
            refused = await self.scorer.judge_prompt(asked.prompt, asked.alpha, calibrated=asked.calibrated)
            return "abstained" if refused else "unknown"
        try:
            judged = await self.scorer.judge(asked)
        except ScoringFailed:
            return "unknown"
        return "abstained" if judged.verdict.abstained else "answered"
