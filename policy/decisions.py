"""Decisions: typed questions about one input, answered from the prompt alone, without decoding.

    predicate   is a statement about the input true?      Yes, No
    choice      which of the options is it?               their values
    score       which of the ordered levels is it?        their labels

    prompt      [system prompt ;] the input, then the question: all questions about an input begin alike
    p(option)   softmax over the options of log p(the token by which the option's label parts from the others')

The label is the option's own text where all of them part at one token. What they begin with alike is fed with the
prompt, and p is exactly how an answer that may only be one of the options would be drawn, since that token decides
the rest. Where they do not part so ("good", "good enough"), the options are lettered.

In policies, records and exemplars a decision is a conversation whose last turn has the question's type as its role:
{"role": "user", the input}, {"role": "choice", the question as the model reads it}. So a policy of answers covers no
decision and a policy of decisions no answer, by the same rule as for every other order of turns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal, cast, get_args

from candor.engine.base import HiddenSummary, PromptReading, Representation
from candor.engine.evidence import of_options
from candor.policy.conversation import BREAK, Conversations, Turn

if TYPE_CHECKING:
    from candor.engine.prompt import ChatFormat

QuestionType = Literal["predicate", "choice", "score"]
TYPES: tuple[QuestionType, ...] = get_args(QuestionType)

EVIDENCE = ("log_sum_surprisal", "mean_margin")
"""Evidence features that differ between decisions, whose answer is one token long (`engine.evidence.of_options`)."""

_CANDIDATES = tuple("".join(letters) for size in (1, 2) for letters in product(ascii_uppercase, repeat=size))
_HOW = {
    "predicate": "Answer Yes if this is true, otherwise No.",
    "choice": "Answer with one of these options:",
    "score": "Answer with one of these levels, which are in order:",
}


@dataclass(frozen=True)
class Option:
    """value: a choice's value or a level's label; choices are typed, so that True and "true" are two."""

    value: str | bool
    description: str | None = None

    @property
    def text(self) -> str:
        return str(self.value).lower() if isinstance(self.value, bool) else self.value


YES_NO = (Option("Yes"), Option("No"))


@dataclass(frozen=True)
class Question:
    """options: in order, at least two; those of a predicate are `YES_NO`. name: the client's."""

    type: QuestionType
    instructions: str
    options: tuple[Option, ...] = YES_NO
    name: str | None = None


@dataclass(frozen=True)
class Posed:
    """A question as a model reads it. labels (K,): what answers each option.

    given: tokens with which all labels begin, which are fed with the prompt; label_ids (K,): what follows them.
    """

    question: Question
    text: str
    labels: tuple[str, ...]
    given: tuple[int, ...]
    label_ids: tuple[int, ...]

    @property
    def turn(self) -> Turn:
        return {"role": self.question.type, "content": self.text}


def ask(question: Question, chat: ChatFormat) -> Posed:
    """Raises ValueError for more options than this model's tokenizer has letters for."""
    texts = [option.text for option in question.options]
    lines = [": ".join(filter(None, (option.text, option.description))) for option in question.options]
    asked = f"{question.instructions}\n{_HOW[question.type]}"
    if parted := _parted([tuple(chat.encode_response(text)) for text in texts]):
        if question.type != "predicate":
            asked += "".join(f"\n- {line}" for line in lines)
        return Posed(question, asked, tuple(texts), *parted)
    letters = _letters(chat)[: len(texts)]
    if len(letters) < len(texts):
        raise ValueError(
            f"{len(texts)} options do not part at one token, and this model's tokenizer has letters for "
            f"{len(letters)}: ask about fewer"
        )
    asked += "".join(f"\n{letter}. {line}" for letter, line in zip(letters, lines, strict=True))
    return _answered_by(question, asked + "\nAnswer with its letter only.", letters, chat)


def asked_before(turn: Turn, said: str, chat: ChatFormat) -> Posed:
    """Returns a question from its turn and what was said to it (`Decided.said`)."""
    labels = tuple(json.loads(said))
    question = Question(cast(QuestionType, turn["role"]), turn["content"], tuple(map(Option, labels)))
    return _answered_by(question, turn["content"], labels, chat)


def _answered_by(question: Question, text: str, labels: Sequence[str], chat: ChatFormat) -> Posed:
    parted = _parted([tuple(chat.encode_response(label)) for label in labels])
    if parted is None:
        raise ValueError(f"the labels {', '.join(labels)} do not part at one token")
    return Posed(question, text, tuple(labels), *parted)


def _parted(codes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the tokens with which all codes begin, and each one's next; None if one has none or two the same."""
    common = in_common(codes)
    following = [code[common] for code in codes if len(code) > common]
    if len(set(following)) < len(codes):
        return None
    return tuple(codes[0][:common]), tuple(following)


def in_common(codes: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all of them begin."""
    one, other = min(codes), max(codes)  # in order, the first and the last part soonest
    ends = min(len(one), len(other))
    return next((at for at in range(ends) if one[at] != other[at]), ends)


@lru_cache(maxsize=8)
def _letters(chat: ChatFormat) -> tuple[str, ...]:
    """Letters, then pairs of them, that part from "A" at its last token, as one token."""
    *head, _ = chat.encode_response("A")
    coded = ((label, chat.encode_response(label)) for label in _CANDIDATES)
    return tuple(label for label, code in coded if [*head] == [*code[:-1]])


@dataclass(frozen=True)
class Prompt:
    """A question's prompt. departure: why it was not calibrated; None if it was."""

    asked: Posed
    ids: tuple[int, ...]
    departure: str | None


def prompts(
    conversations: Conversations, chat: ChatFormat, text: str, questions: Sequence[Posed]
) -> list[Prompt]:
    """Returns the prompt of each question about the input `text`; the input is tokenised once.

    Raises ValueError if the model's template refuses them.
    """
    user = {"role": "user", "content": text}
    resolved = [conversations.resolve((user, one.turn)) for one in questions]
    first = resolved[0]
    endings = [BREAK + one.text for one in questions]
    ids = chat.encode_endings(first.turns[:-1], endings, first.template_arguments)
    return [
        Prompt(one, (*some, *one.given), conversation.departure)
        for one, some, conversation in zip(questions, ids, resolved, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Decided:
    """One question decided. probabilities (K,): the model's, over the options. reading: of its prompt."""

    asked: Posed
    probabilities: tuple[float, ...]
    reading: PromptReading
    positions: int

    @classmethod
    def of(cls, prompt: Prompt, reading: PromptReading) -> Decided:
        top = max(reading.logprobs)
        weights = [math.exp(one - top) for one in reading.logprobs]
        total = sum(weights)
        return cls(prompt.asked, tuple(one / total for one in weights), reading, len(prompt.ids))

    @property
    def said(self) -> str:
        """JSON: the probabilities by label."""
        return json.dumps(dict(zip(self.asked.labels, self.probabilities, strict=True)), ensure_ascii=False)

    @property
    def choice(self) -> int:
        """Index of the likeliest option, the first of equals: what is judged right or wrong."""
        return self.probabilities.index(max(self.probabilities))

    def summary(self, representation: Representation) -> HiddenSummary:
        """What is judged: the prompt's states, and the evidence of an answer of one token, the choice.

        The last state is turned by the choice's place, from 1 for the first option to -1 for the last. The state
        shows which option is right, the same whichever was chosen; times 1 or -1 it shows whether the choice is.
        """
        states = self.reading.states
        turned = states.last * (1 - 2 * self.choice / (len(self.probabilities) - 1))
        evidence = of_options(representation.evidence, self.reading.logprobs)
        return HiddenSummary(states.mean, turned, evidence, self.positions, states.complete)

    def calibrated(self, right: float | None) -> tuple[float, ...]:
        """Probabilities (K,) under which the choice has the probability `right`, and the others share the rest as the
        model has it; None: the model's own."""
        if right is None:
            return self.probabilities
        chosen, others = self.choice, len(self.probabilities) - 1
        left = sum(one for at, one in enumerate(self.probabilities) if at != chosen)
        return tuple(
            right if at == chosen else (1 - right) * (one / left if left else 1 / others)
            for at, one in enumerate(self.probabilities)
        )
