"""Labelled data. Every record is checked before anything is generated.

A record has a conversation to answer, and two things that may be given or left to be found:

    response    given, or the engine answers
    label       given (1 correct, 0 not), or the verifier labels the response by the reference

Two prompts are *the same* when their messages agree in role and, after `verifiers.collapse` (Unicode NFC, white
space collapsed), in content. The same prompt never stands on both sides of a split, and the same prompt with the
same response has one label.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from candor.calibration.errors import DataError, VerifierError
from candor.calibration.shapes import INSTEAD, UNKNOWN, Reading, flattened, label_of, messages_of, pick
from candor.calibration.sources import Row, Rows, kind_of, read_rows
from candor.calibration.verifiers import as_reference, collapse, load_verifier, normalise, reference_problem
from candor.policy.conversation import shown

Label = Literal[0, 1]
T = TypeVar("T")

ROLES = ("system", "user", "assistant")

REMEDY = (
    'A record has "prompt" or "messages", and either "reference" and "verifier" (or --verifier), or "response" and '
    '"label" (1 or 0). Columns of other names are named by --columns, such as "prompt=question, reference=answer". '
    "Correct these lines and run again."
)


@dataclass(frozen=True)
class Record:
    """One labelled example. Without a response the engine answers; without a label the verifier labels.

    messages: the conversation to answer, each {"role", "content"}, the last by the user.
    line: its number in the file, from 1; unit: what is counted. folder: the file's folder, where its verifier may be.
    row: all columns that it was read with, which a verifier may ask for.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    line: int
    reference: Any = None
    verifier: str | None = None
    response: str | None = None
    label: Label | None = None
    folder: Path | None = None
    unit: str = "line"
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where it stands, in words: "line 7"."""
        return f"{self.unit} {self.line}"

    @property
    def prompt(self) -> str:
        """The conversation as text to show."""
        return shown(self.messages)

    @cached_property
    def prompt_digest(self) -> str:
        return prompt_digest(self.messages)


def prompt_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """16 hex digits, equal iff the prompts are the same (chance collisions at 2^-64 a pair)."""
    return _digest(["case counts", *([one["role"], collapse(one["content"])] for one in messages)])


def earlier_prompt_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """The digest in reports of bundles made before case counted; never equal to one of `prompt_digest`."""
    return _digest([[one["role"], normalise(one["content"])] for one in messages])


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """The records of one source. rows: what they were read from. program: that wrote it, if known.

    columns: by field, the columns it was taken from. ignored: columns that were not read. unknown: rows whose label
    nobody knew, which are left out.
    """

    source: Path
    records: list[Record]
    rows: Rows
    program: str | None
    columns: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    unknown: int

    def summary(self) -> str:
        """One line that says what was read, and how it was understood."""
        what = f"{self.rows}, as {self.program} writes it" if self.program else str(self.rows)
        said = [f"{len(self.records)} records from {what}"]
        other = {name: used for name, used in self.columns.items() if used != (name,)}
        said += [f"{name} from {' or '.join(map(json.dumps, used))}" for name, used in other.items()]
        if self.ignored:
            said.append(f"not read: {', '.join(map(json.dumps, self.ignored))}")
        if self.unknown:
            share = self.unknown / (self.unknown + len(self.records))
            said.append(f"{self.unknown} of unknown label left out ({share:.0%})")
        return f"{self.source}: {'; '.join(said)}"


def load_records(source: Path | str, reading: Reading | None = None) -> list[Record]:
    """Reads every record of a file or data set; see `load`."""
    return load(source, reading).records


def load(source: Path | str, reading: Reading | None = None) -> Loaded:
    """Reads every record.

    Raises DataError that lists the offending lines: not to be read, missing fields, wrong types, an unusable verifier
    or reference, a repeated id, one answer with two labels, one prompt with two references; also where there is no
    record.
    """
    reading = reading or Reading()
    found = read_rows(source)
    folder = Path(source).parent if not str(source).startswith("hf:") else None
    programs: Counter[str | None] = Counter()
    columns: dict[str, dict[str, None]] = {}
    seen: dict[str, None] = {}
    records: list[Record] = []
    problems = list(found.problems)
    unknown = 0
    for number, row in found.rows:
        try:
            program, flat = flattened(row)
            fields, used = pick(flat, reading)
            seen |= dict.fromkeys(name for name in flat if name not in INSTEAD.get(program or "", ()))
            record = _record(
                fields, number, found, folder, flat, annotated=program in ("Argilla", "Label Studio")
            )
        except ValueError as error:
            problems.append(f"{found.unit} {number}: {error}")
            continue
        programs[program] += 1
        for name, column in used.items():
            columns.setdefault(name, {})[column] = None
        if record is None:
            unknown += 1
        else:
            records.append(record)
    problems += repeated_ids(records) + _given_twice(records) + two_references(records)
    if problems:
        raise DataError.from_problems(Path(source), problems, REMEDY)
    if not records:
        raise DataError(f"{source} holds no record; {REMEDY[0].lower()}{REMEDY[1:]}")
    read = {column for used in columns.values() for column in used}
    return Loaded(
        Path(source),
        records,
        found,
        next(iter(programs)) if len(programs) == 1 else None,
        {name: tuple(used) for name, used in columns.items()},
        tuple(name for name in seen if name not in read),
        unknown,
    )


def parse_lines(path: Path, parse: Callable[[dict[str, Any], int], T], remedy: str) -> list[T]:
    """Applies `parse` (row, number from 1) to every row of a file.

    parse: raises ValueError with what is wrong. Raises DataError.
    """
    found = read_rows(path)
    made: list[T] = []
    problems = list(found.problems)
    for number, row in found.rows:
        try:
            made.append(parse(row, number))
        except ValueError as error:
            problems.append(f"{found.unit} {number}: {error}")
    if problems:
        raise DataError.from_problems(path, problems, remedy)
    if not made:
        raise DataError(f"{path} holds no record; {remedy[0].lower()}{remedy[1:]}")
    return made


def require_disjoint(
    path: Path, records: Sequence[Record], other_path: Path, others: Sequence[Record]
) -> None:
    """Raises DataError if a prompt is in both files, since held-out figures must be about unseen prompts."""
    seen = {record.prompt_digest: record.place for record in records}
    shared = [other for other in others if other.prompt_digest in seen]
    if shared:
        problems = [
            f"{other.place}: same prompt as {seen[other.prompt_digest]} of {path}" for other in shared
        ]
        raise DataError.from_problems(other_path, problems, "Remove these prompts from one of the two files.")


def _record(
    fields: Row, number: int, rows: Rows, folder: Path | None, row: Row, annotated: bool
) -> Record | None:
    """None for a label that is unknown. annotated: an unknown reference is one on which annotators disagree."""
    made = partial(
        Record,
        _id(fields.get("id", number)),
        _conversation(fields, row),
        number,
        folder=folder,
        unit=rows.unit,
        row=row,
    )
    response = fields.get("response")
    if "response" in fields and not isinstance(response, str):
        raise ValueError(f'"response" must be a string, not {kind_of(response)}')
    if "label" in fields:
        if response is None:
            raise ValueError(
                f'missing "response", the answer that the label is about (there are {_names(row)}); '
                "if the label is the right answer itself, say --columns reference=label"
            )
        label = label_of(fields["label"])
        if label == UNKNOWN:
            return None
        return made(
            reference=fields.get("reference"),
            verifier=fields.get("verifier") if "reference" in fields else None,
            response=response,
            label=1 if label == 1 else 0,
        )
    if annotated and fields.get("reference") == UNKNOWN:
        return None
    verifier = fields.get("verifier")
    if verifier is None:
        missing = '"label"' if response is not None else '"verifier"'
        raise ValueError(
            f"missing {missing} (there are {_names(row)}): say with --verifier how an answer is judged, such as "
            "--verifier exact"
        )
    if not isinstance(verifier, str):
        raise ValueError(f'"verifier" must be a string, not {kind_of(verifier)}')
    try:
        verify = load_verifier(verifier, folder)
        if "reference" not in fields and verify.needs_reference and "reference" not in row:
            raise ValueError(f'missing "reference" (there are {_names(row)})')
        reference = as_reference(
            verifier, fields.get("reference"), fields.get("options"), typed=rows.kind.startswith("JSON")
        )
    except VerifierError as error:
        raise ValueError(str(error)) from error
    if problem := reference_problem(verifier, reference):
        raise ValueError(problem)
    return made(reference=reference, verifier=verifier, response=response)


def _conversation(fields: Row, row: Row) -> tuple[dict[str, str], ...]:
    if "messages" in fields:
        messages = read_messages(messages_of(fields["messages"]))
    elif "prompt" in fields:
        messages = read_messages([{"role": "user", "content": fields["prompt"]}])
    else:
        raise ValueError(f'missing "prompt" or "messages" (there are {_names(row)})')
    if "system" in fields:
        messages = (*read_messages([{"role": "system", "content": fields["system"]}], "system"), *messages)
    return messages


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"id" must be a string or an integer, not {kind_of(value)}')
    return str(value)


def _names(row: Row) -> str:
    return ", ".join(map(json.dumps, row)) or "no columns"


def read_messages(value: Any, last: str = "user") -> tuple[dict[str, str], ...]:
    """A conversation, in the forms that the server takes. last: the role of its last message.

    Raises ValueError with what is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f'"messages" must be a non-empty list, not {kind_of(value)}')
    messages = tuple(_message(index, one) for index, one in enumerate(value))
    if messages[-1]["role"] != last:
        raise ValueError(f"the last message must be by the {last}, not by the {messages[-1]['role']}")
    return messages


def _message(index: int, message: Any) -> dict[str, str]:
    where = f'"messages"[{index}]'
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f'{where} must be {{"role", "content"}}')
    role, content = message["role"], message["content"]
    if message.get("tool_calls") or message.get("function_call") or role in ("tool", "function"):
        raise ValueError(f"{where} calls a tool or brings its result; the server takes texts alone")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, developer")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in _TEXTS for part in content):
            raise ValueError(f"{where}: content may have parts of type text alone")
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if content is None and role == "assistant":
        content = message.get("refusal")
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, not {kind_of(content)}")
    return {"role": role, "content": content}


_TEXTS = ("text", "input_text", "output_text")


def repeated_ids(records: Sequence[Record]) -> list[str]:
    """A problem for each id that stands before."""
    first: dict[str, Record] = {}
    problems = []
    for record in records:
        other = first.setdefault(record.id, record)
        if other is not record:
            problems.append(f'{record.place}: id "{record.id}" stands on {other.place} already')
    return problems


def _given_twice(records: Sequence[Record]) -> list[str]:
    first: dict[tuple[str, str], Record] = {}
    problems = []
    for record in records:
        if record.response is None or record.label is None:
            continue
        other = first.setdefault((record.prompt_digest, record.response), record)
        if other.label != record.label:
            problems.append(
                f"{record.place}: label {record.label}, but {other.place} has the same prompt and "
                f"response with label {other.label}"
            )
    return problems


def two_references(records: Sequence[Record]) -> list[str]:
    """A problem for each prompt that has another right answer before: one answer would be both right and wrong."""
    first: dict[str, Record] = {}
    problems = []
    for record in records:
        if record.label is not None:
            continue
        other = first.setdefault(record.prompt_digest, record)
        if (other.verifier, other.reference) != (record.verifier, record.reference):
            problems.append(
                f"{record.place}: same prompt as {other.place}, but another reference or verifier; where several "
                "answers are right, give one record a list of them"
            )
    return problems
