"""Asks the model again, for methods that need more than the answer's own pass, and counts their cost in tokens.

Replies are kept in the cache of answers, without states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from candor.calibration.cache import AnswerCache, CachedAnswer, cache_key
from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled
from candor.engine.base import Engine, Generation, Sampling
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Conversation


@dataclass(frozen=True)
class FurtherQuestion:
    """One more request to the model about a record."""

    conversation: Conversation
    sampling: Sampling


@dataclass(frozen=True)
class Replies:
    """The replies to one record's questions. read: total prompt tokens. written: total reply tokens."""

    texts: tuple[str, ...]
    read: int
    written: int


@dataclass(frozen=True)
class AskedAgain:
    """A record's conversation as it was served, its answer, and the replies to further questions."""

    conversation: Conversation
    answer: Labelled
    replies: Replies


async def ask(
    engine: Engine,
    chat: ChatFormat,
    questions: Sequence[Sequence[FurtherQuestion]],
    cache: AnswerCache,
    concurrency: int,
    progress: Callable[[int], object],
) -> list[Replies]:
    """Gets the replies to each record's questions, in order.

    Raises CalibrationError where the model's template takes no such question, CacheError, or the engine's errors.
    """
    try:
        prompts = [[question.conversation.encode(chat) for question in several] for several in questions]
    except ValueError as error:
        raise CalibrationError(f"{error}; leave this method out: name the others with --compare") from error
    replies: dict[tuple[int, int], tuple[str, int, int]] = {}
    todo = iter([(i, j) for i, several in enumerate(questions) for j in range(len(several))])

    async def work() -> None:
        for i, j in todo:  # workers share the iterator, so each item goes to one of them
            ids = prompts[i][j]
            text = await _reply(engine, questions[i][j], ids, cache)
            replies[i, j] = text, len(ids), len(chat.encode_response(text))
            progress(1)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    found = []
    for i, several in enumerate(questions):
        texts, read, written = zip(*(replies[i, j] for j in range(len(several))), strict=True)
        found.append(Replies(texts, sum(read), sum(written)))
    return found


async def _reply(engine: Engine, question: FurtherQuestion, ids: list[int], cache: AnswerCache) -> str:
    identity = {name: value for name, value in asdict(engine.identity).items() if name != "name"}
    key = cache_key(
        model=identity,
        asked_again=True,
        messages=list(question.conversation.turns),
        sampling=asdict(question.sampling),
    )
    known = cache.get(key)
    if known is not None:
        return known.response
    async for piece in engine.generate(ids, question.sampling, capture=False):
        if isinstance(piece, Generation):
            cache.put(key, CachedAnswer(piece.text, piece.truncated, torch.empty(0)))
            return piece.text
    raise CalibrationError("the engine ended without a reply; run again to resume")
