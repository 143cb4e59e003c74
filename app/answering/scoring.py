"""Scoring: from an engine's hidden state to a verdict, in batches, off the event loop, within a time limit.

With two gates, a prompt is judged too, when its prefill ends (`judge_prompt`), so that it can be refused unwritten.

One call `measure((n, D))` measures h of all answers that finished while the last batch ran. The decision at alpha
(`policy.judging`) is cheap; it is made once for each alpha in the batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from candor.app.answering.batching import MicroBatcher
from candor.engine.base import HiddenSummary, PromptStates
from candor.model_store.bundle import Bundle, Exemplar
from candor.policy.certificate import Certificate, EstimatorKind, RuleCertificate
from candor.policy.decision import Verdict, suspend
from candor.policy.judging import TwoGates, judge, judge_by_rule, judge_prompts
from candor.policy.monitor import StandingName
from candor.sdm.rule import PromptEstimate

Cause = Literal["not_captured", "incomplete", "non_finite", "timeout", "error"]

logger = logging.getLogger("candor")

LARGEST_BATCH = 64
"""Maximum rows measured at once. It bounds the memory of the distances, rows x support."""
_PROMPTS = 16
"""Maximum prompts judged at once; more are no cheaper together."""


class ScoringFailed(Exception):
    """An answer could not be scored; its verdict must be `unavailable`."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


@dataclass(frozen=True)
class NearExemplar:
    """A support exemplar near an answer. distance: L2 between their h'."""

    exemplar: Exemplar
    distance: float


@dataclass(frozen=True)
class Judged:
    """A verdict with the nearest exemplars. exemplars: nearest first, as many as the request asked for.

    standing: of the certificate that covers it; None if there is none, or nobody watches it.
    """

    verdict: Verdict
    exemplars: tuple[NearExemplar, ...] = ()
    standing: StandingName | None = None


@dataclass(frozen=True)
class ScoringRequest:
    """One answer's states and how to judge it. prompt: at the end of prefill; None or incomplete where they are not
    known, which two gates need. prompt_seen: what the gates found then; None if they have not looked. calibrated:
    whether request and answer kept to the policy."""

    hidden: HiddenSummary | None
    alpha: float
    calibrated: bool
    certified_only: bool = False
    exemplars: int = 0
    prompt: PromptStates | None = None
    prompt_seen: PromptEstimate | None = None


@dataclass(frozen=True)
class JudgedPrompt:
    """refusal: the verdict on a prompt that no answer can be let through for; None for every other."""

    refusal: Verdict | None
    seen: PromptEstimate


class Scorer:
    """Judges answers by one bundle: by its two gates, or by its regions under one estimator."""

    def __init__(
        self,
        bundle: Bundle,
        kind: EstimatorKind,
        timeout_s: float,
        gates: TwoGates | None = None,
        standing: Callable[[Certificate | RuleCertificate], StandingName | None] = lambda _: None,
        *,
        withholds_suspended: bool = False,
    ) -> None:
        """standing: of a certificate now. withholds_suspended: let nothing through at an alpha whose certificate is
        suspended; else only requests that want certified answers alone are refused them."""
        self._standing = standing
        self._withholds_suspended = withholds_suspended
        self._bundle = bundle
        self.gates = gates
        self._kind = kind
        self._timeout_s = timeout_s
        self._batcher = MicroBatcher(self._judge_batch, LARGEST_BATCH)
        # A thread of its own: a prompt that is refused early saves more than it could gain in a larger batch.
        self._prompts = MicroBatcher(self._judge_prompts, _PROMPTS)

    async def warm_up(self) -> None:
        """Judges an empty state at every alpha. The first comparison builds caches, which takes seconds for a large
        support; this way they are ready before the first answer."""
        none = torch.zeros(0)
        nothing = HiddenSummary(none, none, none, positions=1, complete=True)
        unread = PromptStates(none, none, complete=True)
        for alpha in self._bundle.estimator.regions:
            await self._batcher.submit(
                ScoringRequest(nothing, alpha, calibrated=True, exemplars=1, prompt=unread)
            )

    async def judge(self, request: ScoringRequest) -> Judged:
        """Returns the verdict on one answer. Raises ScoringFailed for every kind of failure."""
        needed = {"answer": request.hidden} | ({"prompt": request.prompt} if self.gates else {})
        for what, states in needed.items():
            if states is None:
                raise ScoringFailed("not_captured", f"the engine gave no states of the {what}")
            if not states.complete:
                raise ScoringFailed("incomplete", f"the engine did not count every position of the {what}")
        try:
            judged = await asyncio.wait_for(self._batcher.submit(request), self._timeout_s)
        except TimeoutError as error:
            raise ScoringFailed("timeout", f"no score within {self._timeout_s} s") from error
        except Exception as error:
            raise ScoringFailed("error", f"{type(error).__name__}: {error}") from error
        if judged.verdict.reason == "scoring_unavailable":
            raise ScoringFailed("non_finite", "the hidden state, or what was made of it, is no finite number")
        return judged

    async def judge_prompt(
        self, prompt: PromptStates, alpha: float, *, calibrated: bool
    ) -> JudgedPrompt | None:
        """Judges a prompt before it is answered. None: it cannot be judged now, and is left to the answer's end."""
        if self.gates is None or not prompt.complete:
            return None
        work = self._prompts.submit((prompt, alpha, calibrated))
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except Exception as error:
            logger.warning("a prompt could not be judged before its answer: %r", error)
            return None

    def close(self) -> None:
        self._batcher.close()
        self._prompts.close()

    @torch.inference_mode()
    def _judge_prompts(self, asked: list[tuple[PromptStates, float, bool]]) -> list[JudgedPrompt]:
        gates = self.gates
        assert gates is not None  # `judge_prompt` checks this
        states = torch.stack([_as(gates.rule.gate.mean, prompt.vector()) for prompt, _, _ in asked])  # (n, P)
        calibrated = torch.tensor([kept for _, _, kept in asked])
        seen = gates.rule.know(states)
        found: dict[int, JudgedPrompt] = {}
        for wanted in {alpha for _, alpha, _ in asked}:
            verdicts = judge_prompts(gates, states, seen, wanted, calibrated=calibrated)
            for row, verdict in enumerate(verdicts):
                if asked[row][1] == wanted:
                    refused = verdict.abstained and verdict.reason != "scoring_unavailable"
                    found[row] = JudgedPrompt(verdict if refused else None, seen.row(row))
        return [found[row] for row in range(len(asked))]

    @torch.inference_mode()
    def _judge_batch(self, requests: list[ScoringRequest]) -> list[Judged]:
        estimator, manifest = self._bundle.estimator, self._bundle.manifest
        h = torch.stack([self._vector(request) for request in requests])  # (n, D)
        measurement = estimator.measure(h)
        calibrated = torch.tensor([request.calibrated for request in requests])  # (n,)
        certified_only = torch.tensor([request.certified_only for request in requests])
        prompts = (
            torch.stack([self._prompt(request) for request in requests]) if self.gates else None
        )  # (n, P)
        seen = [request.prompt_seen for request in requests if request.prompt_seen is not None]
        prompts_seen = PromptEstimate.joined(seen) if len(seen) == len(requests) else None
        found: dict[int, Judged] = {}
        for alpha in {request.alpha for request in requests}:
            if self.gates is not None and prompts is not None:
                judgement = judge_by_rule(
                    estimator,
                    self.gates,
                    measurement,
                    h,
                    prompts,
                    alpha,
                    calibrated=calibrated,
                    prompts_seen=prompts_seen,
                )
            else:
                judgement = judge(
                    estimator,
                    measurement,
                    alpha,
                    self._kind,
                    calibrated=calibrated,
                    certificates=manifest.certificates,
                    certified_only=certified_only,
                )
            stands = self._standing(judgement.certificate) if judgement.certificate else None
            if stands == "suspended":
                rows = certified_only | self._withholds_suspended
                judgement = replace(judgement, decisions=suspend(judgement.decisions, rows))
            for row, request in enumerate(requests):
                if request.alpha == alpha:
                    verdict = judgement.verdict(row)
                    nearest = self._nearest(h[row], request.exemplars)
                    found[row] = Judged(verdict, nearest, stands if verdict.certificate else None)
        return [found[row] for row in range(len(requests))]

    def _vector(self, request: ScoringRequest) -> torch.Tensor:
        """Returns h (D,). A vector of another size is no state of this model, so it is replaced by NaN."""
        assert request.hidden is not None  # `judge` checks this before it queues the request
        h = request.hidden.vector(self._bundle.manifest.representation)
        return _as(self._bundle.estimator.adaptor.mean, h)

    def _prompt(self, request: ScoringRequest) -> torch.Tensor:
        """Returns the prompt's states (P,), likewise."""
        assert self.gates is not None  # the caller checks this
        assert request.prompt is not None  # and `judge` this
        return _as(self.gates.rule.gate.mean, request.prompt.vector())

    def _nearest(self, h: torch.Tensor, exemplars: int) -> tuple[NearExemplar, ...]:
        if not exemplars:
            return ()
        estimator = self._bundle.estimator
        squared, rows = estimator.nearest(
            h.unsqueeze(0), min(exemplars, len(estimator.support))
        )  # (1, count)
        return tuple(
            NearExemplar(self._bundle.exemplars[row], math.sqrt(distance))
            for distance, row in zip(squared[0].tolist(), rows[0].tolist(), strict=True)
            if row >= 0  # a state that is not finite has no neighbours: row -1
        )


def _as(expected: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Returns the states if they have the expected shape, else NaN of it: they are none of this model's."""
    return states if states.shape == expected.shape else torch.full_like(expected, math.nan)
