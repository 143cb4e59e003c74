"""Judges the answers of one request that vLLM's own handlers write (`engine.vllm_client.Judge`).

Whether an answer is calibrated is decided by default deny: its prompt must be one that was rendered as calibration
rendered it, and what vLLM was asked for must be what the policy asks for, field by field.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from candor.app.answering.request import Reliability
from candor.app.answering.scoring import Judged, JudgedPrompt
from candor.app.answering.service import Answer, AnswerService, unwritten
from candor.app.telemetry.tracing import AnswerTrace
from candor.engine.base import Engine, Generation, PromptStates, RequestRefused, Sampling

Encode = Callable[[Sequence[dict[str, str]], Mapping[str, Any] | None], Awaitable[tuple[list[int], bool]]]
"""Turns and template arguments -> token ids, and whether calibration covered such conversations."""


class Asked(Protocol):
    """What vLLM was asked for (`engine.vllm_client.Asked`)."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling | None


class Judging:
    """answers: the finished choices, by index. failure: what this house raised while vLLM's handler ran."""

    def __init__(
        self,
        service: AnswerService,
        reliability: Reliability,
        most_prompt_tokens: int,
        encode: Encode,
        note: Callable[[Answer], None],
    ) -> None:
        """note: gets each answer once it is judged."""
        self.failure: Exception | None = None
        self._most_prompt_tokens = most_prompt_tokens
        self.engine: Engine = service.engine
        self.capture = reliability.mode != "off"
        self.prompt_states = self.capture and service.judges_prompts
        self.buffered = reliability.buffered
        self.answers: dict[int, Answer] = {}
        self.reliability = reliability
        self._service = service
        self._encode = encode
        self._note = note
        self._begun = 0
        self._read: dict[int, JudgedPrompt | None] = {}
        self._calibrated: set[tuple[int, ...]] = set()
        self._traces: dict[int, AnswerTrace | None] = {}

    def begin(self, choices: int, prompt_tokens: int) -> int:
        if prompt_tokens > self._most_prompt_tokens:
            raise RequestRefused(
                f"prompt tokens: at most {self._most_prompt_tokens} on this server, got {prompt_tokens}",
                400,
                "messages",
                "too_large",
            )
        first, self._begun = self._begun, self._begun + choices
        return first

    @contextmanager
    def choice(self, index: int) -> Iterator[None]:
        with self._service.traced(index) as trace:
            self._traces[index] = trace
            yield

    async def encode(
        self, turns: Sequence[dict[str, str]], template_arguments: Mapping[str, Any] | None
    ) -> list[int]:
        ids, calibrated = await self._encode(turns, template_arguments)
        if calibrated:
            self._calibrated.add(tuple(ids))
        return ids

    async def refuses(self, index: int, prompt: PromptStates, asked: Asked) -> bool:
        read = await self._service.read(prompt, self.reliability, calibrated=self._keeps(asked))
        if read is None or read.refusal is None:
            self._read[index] = read
            return False
        empty, refusal = unwritten(len(asked.prompt_ids), prompt), Judged(read.refusal)
        if trace := self._traces.get(index):
            trace.generated(empty)
        self._finish(Answer(index, empty, refusal, self.reliability.replacement, unwritten=True))
        return True

    async def withholds(self, index: int, generation: Generation, asked: Asked) -> bool:
        if trace := self._traces.get(index):
            trace.generated(generation)
        if not self.capture:
            self._finish(Answer(index, generation, None, None))
            return False
        judged = await self._service.judged(
            generation, self.reliability, calibrated=self._keeps(asked), read=self._read.pop(index, None)
        )
        replacement = self.reliability.replacement if judged.verdict.abstained else None
        self._finish(Answer(index, generation, judged, replacement))
        return replacement is not None

    @property
    def finished(self) -> list[Answer]:
        """The answers, in index order."""
        return [answer for _, answer in sorted(self.answers.items())]

    def _keeps(self, asked: Asked) -> bool:
        policy = self._service.policy
        return (
            asked.prompt_ids in self._calibrated
            and asked.sampling is not None
            and policy.draws(asked.sampling)
            and policy.resample == 1
        )

    def _finish(self, answer: Answer) -> None:
        self.answers[answer.index] = answer
        if answer.judged is not None and (trace := self._traces.get(answer.index)):
            trace.judged(answer.judged.verdict)
        self._service.count(answer)
        self._note(answer)
