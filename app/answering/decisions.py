"""Decisions: typed questions about one input, from a body to verdicts.

    DecisionRequest -> for each question: Engine.read_prompt -> options' probabilities, states -> Scorer.judge

The prompts begin alike, so the engine computes the input once. At most `CANDOR_MAX_CHOICES` of a request's questions
are with the engine at a time, and that many places it takes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from candor.app.answering.request import Bulk, Reliability, RequestResolver
from candor.app.answering.scoring import Judged
from candor.app.answering.service import AnswerService
from candor.app.edge.limits import Refused, at_most
from candor.app.edge.schemas.decisions import DecisionRequest as Body
from candor.app.edge.schemas.reliability import ReliabilityOptions
from candor.engine.base import PromptTooLong
from candor.policy.decision import FOLLOWS, Verdict
from candor.policy.decisions import Decided, Prompt, ask, in_common, prompts

_MOST_READ = 1 << 22
"""Maximum tokens of one request's prompts together, though most are the same: each is sent to the engine whole."""


@dataclass(frozen=True)
class DecisionRequest:
    """Resolved questions about one input. tokens: of their prompts; what these have in common counts once.

    places: how many of them are with the engine at a time. caller: whose places it takes.
    """

    prompts: tuple[Prompt, ...]
    tokens: int
    reliability: Reliability
    places: int
    caller: str = "anyone"


@dataclass(frozen=True)
class Decision:
    """A question's answer. judged: None in mode off. withheld: nothing of it may be shown."""

    decided: Decided
    judged: Judged | None
    withheld: bool

    @property
    def probabilities(self) -> tuple[float, ...]:
        """(K,), of the options: calibrated where questions of this kind were, else the model's own."""
        return self.decided.calibrated(_right(self.judged.verdict) if self.judged else None)


class DecisionResolver(RequestResolver):
    """Resolves bodies of decisions too. Raises Refused or PromptTooLong."""

    def measure_decisions(self, body: Body) -> Bulk:
        """As `measure`, for decisions."""
        lengths = [question.length for question in body.questions]
        text, longest = len(body.text), self._chat.longest_token
        if text + max(lengths) > longest * self._room:
            raise PromptTooLong(
                f"this model's maximum context length is {self._room} tokens, of at most {longest} characters each; "
                f"input and a question have {text + max(lengths)} characters: shorten them"
            )
        return Bulk(self._places(body), text + sum(lengths))

    def decisions(self, body: Body) -> DecisionRequest:
        """Takes time that grows with the texts: call it off the event loop."""
        self._check_beginning(body.text, "input")
        conversations, chat = self._policy.conversations, self._chat
        asked = []
        for number, question in enumerate(body.questions):
            try:
                asked.append(ask(question.to_question(), chat))
            except ValueError as error:
                raise Refused(str(error), f"questions[{number}]") from error
            self._check_beginning(asked[-1].text, f"questions[{number}]")
        try:
            (first,) = prompts(conversations, chat, body.text, asked[:1])
            most = len(first.ids) * len(asked)
            at_most(_MOST_READ, most, "tokens of all prompts (input times questions)", "questions")
            made = prompts(conversations, chat, body.text, asked)
        except ValueError as error:
            raise Refused(str(error), "input") from error
        for prompt in made:
            self._check_fit(prompt.ids, 1, "input")
        wished = body.reliability.model_dump() if body.reliability else {}
        shared = in_common([prompt.ids for prompt in made])
        return DecisionRequest(
            tuple(made),
            shared + sum(len(prompt.ids) - shared for prompt in made),
            self.resolve_reliability(ReliabilityOptions(**wished), streamed=False),
            self._places(body),
        )

    def _places(self, body: Body) -> int:
        return min(len(body.questions), self.limits.choices)


class DecisionService(AnswerService):
    """Decides too. Raises Overloaded, PromptTooLong, EngineDead or EngineError."""

    async def decide(self, request: DecisionRequest) -> list[Decision]:
        """Returns the decisions in the questions' order. Cancelling it ends the engine's work for it."""
        with self._admission.admit(request.caller, request.places, request.tokens):
            found: dict[int, Decided] = {}
            todo = iter(enumerate(request.prompts))

            async def read() -> None:
                for index, prompt in todo:  # shared, so that each question is read once
                    with self._watch.waiting():
                        reading = await self.engine.read_prompt(prompt.ids, prompt.asked.label_ids)
                    found[index] = Decided.of(prompt, reading)

            try:
                async with asyncio.TaskGroup() as readers:
                    for _ in range(request.places):
                        readers.create_task(read())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors
            judging = (self._decision(found[at], one, request) for at, one in enumerate(request.prompts))
            return list(await asyncio.gather(*judging))

    async def _decision(self, decided: Decided, prompt: Prompt, request: DecisionRequest) -> Decision:
        asked = request.reliability
        if asked.mode == "off":
            return Decision(decided, None, withheld=False)
        judged = await self._judge(
            decided.summary(self.engine.representation),
            decided.reading.states,
            asked,
            calibrated=prompt.departure is None,
        )
        self._metrics.count(judged.verdict)
        return Decision(decided, judged, asked.mode == "abstain" and judged.verdict.abstained)


def _right(verdict: Verdict) -> float | None:
    """The calibrated probability that the choice is right; None where calibration saw nothing like it."""
    if not verdict.calibrated or verdict.region == "ood" or verdict.probability is None:
        return None
    if verdict.rule is None and verdict.figures is not None and verdict.figures.prediction != FOLLOWS:
        return 1 - verdict.probability
    return verdict.probability
