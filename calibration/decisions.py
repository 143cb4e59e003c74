"""Labelled questions, for `candor calibrate --decisions`: read, decided by the engine, and labelled.

    {"id": "q1", "input": "i'm really happy with this purchase.", "answer": true,
     "question": {"type": "predicate", "instructions": "The review is positive."}}

A question has OpenAI's form (`type`, `instructions`, `choices` or `levels`). The answer is true or false, a choice's
value or a level's label. What becomes of the answers is the same as for written ones (`calibration.run`): they are
right where the likeliest option is the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candor.calibration.cache import AnswerCache, CachedAnswer
from candor.calibration.data import Record, repeated_ids, two_references
from candor.calibration.errors import DataError
from candor.calibration.generate import Labelled, answer_key, fault_of, prompt_vector, vector
from candor.calibration.sources import read_rows
from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import shown
from candor.policy.decisions import TYPES, Decided, Option, Posed, Question, ask, prompts
from candor.policy.policy import Policy

REMEDY = (
    'A record has "input", "question" (type, instructions, choices or levels) and "answer": true or false, a value '
    "of the choices or a label of the levels. Correct these lines and run again."
)


@dataclass(frozen=True, kw_only=True)
class DecisionRecord(Record):
    """A question with its right answer. right: the answer's place among the options."""

    asked: Posed = field(compare=False)
    right: int = field(compare=False)


def load_decisions(path: Path, chat: ChatFormat) -> tuple[list[DecisionRecord], str]:
    """Returns a file's records and its SHA-256. Raises DataError that lists the offending lines."""
    found = read_rows(path)
    records: list[DecisionRecord] = []
    problems = list(found.problems)
    for number, row in found.rows:
        try:
            records.append(_record(row, number, found.unit, chat))
        except ValueError as error:
            problems.append(f"{found.unit} {number}: {error}")
    problems += repeated_ids(records) + two_references(records)
    if problems:
        raise DataError.from_problems(path, problems, REMEDY)
    if not records:
        raise DataError(f"{path} holds no record; {REMEDY[0].lower()}{REMEDY[1:]}")
    return records, found.sha256


def _record(row: dict[str, Any], number: int, unit: str, chat: ChatFormat) -> DecisionRecord:
    missing = [name for name in ("input", "question", "answer") if name not in row]
    if missing:
        raise ValueError(f"missing {', '.join(map(json.dumps, missing))}")
    asked = ask(_question(row["question"]), chat)
    options = asked.question.options
    given = row["answer"]
    if asked.question.type == "predicate":
        given = {True: "Yes", False: "No"}[given] if isinstance(given, bool) else given
    values = [(type(option.value), option.value) for option in options]
    if (type(given), given) not in values:
        raise ValueError(f'"answer" {json.dumps(row["answer"])} is none of the question\'s options')
    right = values.index((type(given), given))
    return DecisionRecord(
        id=str(row.get("id", number)),
        messages=({"role": "user", "content": _input(row["input"])}, asked.turn),
        line=number,
        reference=asked.labels[right],
        unit=unit,
        row=row,
        asked=asked,
        right=right,
    )


def _input(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        return shown(value)
    raise ValueError('"input" must be a text, or a list of {"role", "content"} with texts')


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in value.values())
    )


def _question(value: Any) -> Question:
    """Raises ValueError with what is wrong."""
    if not isinstance(value, dict) or value.get("type") not in TYPES:
        raise ValueError(f'"question" must be an object whose type is one of {", ".join(TYPES)}')
    kind, instructions = value["type"], value.get("instructions")
    if not isinstance(instructions, str) or not instructions:
        raise ValueError('"question" must have "instructions", a text')
    if kind == "predicate":
        return Question(kind, instructions)
    name, of = {"choice": ("choices", "value"), "score": ("levels", "label")}[kind]
    given = value.get(name)
    if not isinstance(given, list) or not all(
        isinstance(one, dict) and _is_option(one, of, kind) for one in given
    ):
        raise ValueError(
            f'"question" must have "{name}", a list of {{"{of}"}}, with a "description" or without'
        )
    options = tuple(Option(one[of], one.get("description")) for one in given)
    if len(options) < 2 or len({(type(one.value), one.value) for one in options}) < len(options):
        raise ValueError(f'"{name}" must be two or more, all different')
    return Question(kind, instructions, options)


def _is_option(one: dict[str, Any], of: str, kind: str) -> bool:
    value, description = one.get(of), one.get("description")
    typed = (isinstance(value, str) and value != "") or (kind == "choice" and isinstance(value, bool))
    return typed and (description is None or isinstance(description, str))


async def decide_records(
    engine: Engine,
    chat: ChatFormat,
    records: Sequence[DecisionRecord],
    policy: Policy,
    cache: AnswerCache,
    concurrency: int,
    progress: Callable[[int], object],
) -> list[Labelled]:
    """Decides every record, in order; what is in `cache` is not read again. Raises as `generate.collect` does."""
    found: dict[int, Labelled] = {}
    todo = iter(enumerate(records))

    async def work() -> None:
        for index, record in todo:  # workers share the iterator, so each record goes to one of them
            key = answer_key(engine, record, policy, engine.representation, policy.sampling())
            answer = cache.get(key)
            if answer is None:
                answer = await _decide(engine, chat, record, policy)
                cache.put(key, answer)
            found[index] = _labelled(record, answer)
            progress(1)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, len(records))):
                workers.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [found[index] for index in range(len(records))]


async def _decide(engine: Engine, chat: ChatFormat, record: DecisionRecord, policy: Policy) -> CachedAnswer:
    (prompt,) = prompts(policy.conversations, chat, record.messages[0]["content"], [record.asked])
    decided = Decided.of(prompt, await engine.read_prompt(prompt.ids, record.asked.label_ids))
    summary = decided.summary(engine.representation)
    return CachedAnswer(
        decided.said,
        False,
        vector(summary, engine.representation),
        prompt_vector(decided.reading.states),
    )


def _labelled(record: DecisionRecord, answer: CachedAnswer) -> Labelled:
    shares = list(json.loads(answer.response).values())
    return Labelled(
        record.id,
        record.prompt_digest,
        record.messages,
        answer.response,
        1 if shares.index(max(shares)) == record.right else 0,
        answer.h,
        fault_of(answer),
        tokens=1,
        prompt_states=answer.prompt,
    )
