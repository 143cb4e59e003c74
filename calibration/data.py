"""Labelled data, one JSON object a line. Every line is checked before anything is generated.

Two kinds of record, freely mixed:

    {"id", "messages", "reference", "verifier"}   the engine answers, the verifier labels
    {"id", "messages", "response", "label"}       the answer and its label (1 correct, 0 not) are given

Two prompts are *the same* when their messages agree in role and, after `verifiers.normalise` (Unicode
NFC, case folded, white space collapsed), in content. The same prompt never stands on both sides of a
split, and the same prompt with the same response has one label.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from candor.calibration.errors import DataError, VerifierError
from candor.calibration.verifiers import load_verifier, normalise, reference_problem
from candor.model_store import strict_json
from candor.policy.conversation import shown

Label = Literal[0, 1]
T = TypeVar("T")

ROLES = ("system", "user", "assistant")
COMMON = frozenset({"id", "messages"})
TO_GENERATE = COMMON | {"reference", "verifier"}
GIVEN = COMMON | {"response", "label"}

REMEDY = (
    'Every line is one JSON object with "id", "messages" and either "reference" and "verifier", '
    'or "response" and "label" (0 or 1). Correct these lines and run again.'
)


@dataclass(frozen=True)
class Record:
    """One labelled example; either reference and verifier are set, or response and label.

    messages: the conversation to answer, each {"role", "content"}, the last by the user.
    line: its line number in the file, from 1. folder: the file's folder, where its verifier may be.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    line: int
    reference: Any = None
    verifier: str | None = None
    response: str | None = None
    label: Label | None = None
    folder: Path | None = None

    @property
    def prompt(self) -> str:
        """The conversation as text to show."""
        return shown(self.messages)

    @cached_property
    def prompt_digest(self) -> str:
        return prompt_digest(self.messages)


def prompt_digest(messages: Sequence[dict[str, str]]) -> str:
    """16 hex digits, equal iff the prompts are the same (chance collisions at 2^-64 a pair)."""
    content = [[message["role"], normalise(message["content"])] for message in messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_records(path: Path) -> list[Record]:
    """Reads every record of a JSON Lines file; blank lines are skipped.

    Raises DataError that lists the offending lines: not UTF-8, not JSON, unknown or missing fields,
    wrong types, an unusable verifier or reference, a repeated id, one answer with two labels; also
    where there is no record.
    """
    parse = partial(_record, folder=path.parent)
    return parse_lines(path, parse, REMEDY, lambda records: _repeated_ids(records) + _given_twice(records))


def parse_lines(
    path: Path,
    parse: Callable[[dict[str, Any], int], T],
    remedy: str,
    check: Callable[[list[T]], list[str]] = lambda _: [],
) -> list[T]:
    """Applies `parse` (object, line number from 1) to every line of a JSON Lines file; blank lines are skipped.

    parse: raises ValueError with what is wrong. check: returns problems across all of them.
    Raises DataError.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error
    made: list[T] = []
    problems: list[str] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            made.append(parse(_object(line, number), number))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    problems += check(made)
    if problems:
        raise DataError.from_problems(path, problems, remedy)
    if not made:
        raise DataError(f"{path} holds no record; {remedy[0].lower()}{remedy[1:]}")
    return made


def require_disjoint(
    path: Path, records: Sequence[Record], other_path: Path, others: Sequence[Record]
) -> None:
    """Raises DataError if a prompt is in both files, since held-out figures must be about unseen prompts."""
    seen = {record.prompt_digest: record.line for record in records}
    shared = [other for other in others if other.prompt_digest in seen]
    if shared:
        problems = [
            f"line {other.line}: same prompt as line {seen[other.prompt_digest]} of {path}"
            for other in shared
        ]
        raise DataError.from_problems(other_path, problems, "Remove these prompts from one of the two files.")


def _object(line: bytes, number: int) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError with what is wrong, without the line number."""
    try:
        fields = strict_json.parse(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {_kind(fields)}")
    return fields


def _record(fields: dict[str, Any], number: int, folder: Path) -> Record:
    _require_fields(fields)
    if not isinstance(fields["id"], str) or not fields["id"]:
        raise ValueError(f'"id" must be a non-empty string, not {_kind(fields["id"])}')
    messages = read_messages(fields["messages"])
    if "response" in fields:
        if not isinstance(fields["response"], str):
            raise ValueError(f'"response" must be a string, not {_kind(fields["response"])}')
        if type(fields["label"]) is not int or fields["label"] not in (0, 1):  # refuses true and 1.0
            raise ValueError(f'"label" must be 0 or 1, not {json.dumps(fields["label"])}')
        label: Label = 1 if fields["label"] == 1 else 0
        return Record(fields["id"], messages, number, response=fields["response"], label=label)
    verifier = fields["verifier"]
    if not isinstance(verifier, str):
        raise ValueError(f'"verifier" must be a string, not {_kind(verifier)}')
    try:
        load_verifier(verifier, folder)
    except VerifierError as error:
        raise ValueError(str(error)) from error
    if problem := reference_problem(verifier, fields["reference"]):
        raise ValueError(problem)
    return Record(
        fields["id"], messages, number, reference=fields["reference"], verifier=verifier, folder=folder
    )


def _require_fields(fields: dict[str, Any]) -> None:
    expected = GIVEN if {"response", "label"} & fields.keys() else TO_GENERATE
    missing = sorted(expected - fields.keys())
    unknown = sorted(fields.keys() - expected)
    complaints = [f"missing {', '.join(map(json.dumps, missing))}"] if missing else []
    complaints += [f"unknown {', '.join(map(json.dumps, unknown))}"] if unknown else []
    if complaints:
        raise ValueError(f"{'; '.join(complaints)} (expected {', '.join(sorted(expected))})")


def read_messages(value: Any) -> tuple[dict[str, str], ...]:
    """A conversation. Raises ValueError with what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError(f'"messages" must be a non-empty list, not {_kind(value)}')
    for index, message in enumerate(value):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f'"messages"[{index}] must be {{"role", "content"}}')
        if message["role"] not in ROLES:
            raise ValueError(f'"messages"[{index}]: role must be one of {", ".join(ROLES)}')
        if not isinstance(message["content"], str):
            raise ValueError(
                f'"messages"[{index}]: content must be a string, not {_kind(message["content"])}'
            )
    if value[-1]["role"] != "user":
        raise ValueError(f"the last message must be by the user, not by the {value[-1]['role']}")
    return tuple(value)


def _repeated_ids(records: Sequence[Record]) -> list[str]:
    first: dict[str, int] = {}
    problems = []
    for record in records:
        line = first.setdefault(record.id, record.line)
        if line != record.line:
            problems.append(f'line {record.line}: id "{record.id}" stands on line {line} already')
    return problems


def _given_twice(records: Sequence[Record]) -> list[str]:
    first: dict[tuple[str, str], Record] = {}
    problems = []
    for record in records:
        if record.response is None:
            continue
        other = first.setdefault((record.prompt_digest, record.response), record)
        if other.label != record.label:
            problems.append(
                f"line {record.line}: label {record.label}, but line {other.line} has the same prompt and "
                f"response with label {other.label}"
            )
    return problems


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value in ("", [], {}):
        return "an empty one"
    return names.get(type(value), "a number")
