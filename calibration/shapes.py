"""What the columns of a row mean: records of our own, and those that other programs write.

    OpenAI fine-tuning    messages that end with the assistant's answer: the reference
    OpenAI Evals          input (text or messages) and ideal (one reference or several); also {"item": {...}}
    Label Studio          data, and what the annotators chose, by the names of the labelling setup
    Argilla               fields, and the submitted responses, by the questions' names; nested or flattened
    ShareGPT, Alpaca      conversations of "human" and "gpt"; an instruction with an input

After that every row is flat, and its columns are found by `Reading.columns`, by their own names, or by a usual name.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from candor.calibration.sources import Row

FIELDS = ("id", "messages", "prompt", "system", "reference", "verifier", "response", "label", "options")
"""What a record is made of. prompt: one user message, in place of messages. system: a system message before it.
options: what may be chosen, for the verifier `choice`."""

UNKNOWN = "unknown"
"""The label of an answer of which nobody can say whether it is right."""

_USUAL = {
    "prompt": ("question", "instruction", "query"),
    "reference": ("ideal", "expected", "expected_output", "target"),
    "response": ("model_answer", "model_response", "model_output", "generation"),
    "label": ("correct", "is_correct", "verdict"),
    "options": ("choices",),
}
INSTEAD = {"ShareGPT": ("conversations",), "Alpaca": ("instruction", "input")}
"""Columns by program of which other columns were made."""

_ANSWERS = ("answer", "completion", "output")
"""The answer that was given where a label stands beside it, else the right one."""

_WORDS: dict[str, int | str] = {
    **dict.fromkeys(("1", "1.0", "true", "right", "yes", "correct", "pass", "passed", "y", "t"), 1),
    **dict.fromkeys(("0", "0.0", "false", "wrong", "no", "incorrect", "fail", "failed", "n", "f"), 0),
    **dict.fromkeys((UNKNOWN, "unsure", "unclear", "skip"), UNKNOWN),
}


@dataclass(frozen=True)
class Reading:
    """How rows are read. columns: by field of `FIELDS`, the column it stands in. verifier: of rows that name none.

    Raises ValueError for a field that there is not.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    verifier: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(self.columns.keys() - set(FIELDS)):
            raise ValueError(f"there is no field {', '.join(unknown)}; the fields are {', '.join(FIELDS)}")

    @classmethod
    def parse(cls, columns: str, verifier: str | None = None) -> Reading:
        """Reads "prompt=question, reference=answer"."""
        return cls(columns_by_field(columns), verifier)


def columns_by_field(text: str) -> dict[str, str]:
    """Reads "prompt=question, reference=answer". Raises ValueError."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"expected FIELD=COLUMN, such as prompt=question, got {bad[0].strip()!r}")
    return {name.strip(): column.strip() for name, column in pairs}


def flattened(row: Row) -> tuple[str | None, Row]:
    """Returns the program that wrote the row, if it is known, and its columns side by side."""
    if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
        return "Label Studio", _label_studio(row)
    if isinstance(row.get("fields"), dict) and "responses" in row:
        return "Argilla", _argilla(row)
    if any(name.endswith(".responses") for name in row):
        return "Argilla", _argilla_flat(row)
    if isinstance(row.get("item"), dict):
        return "OpenAI Evals", {"id": row.get("id"), **row["item"]}
    if "input" in row and "ideal" in row:
        rest = {name: value for name, value in row.items() if name != "input"}
        return "OpenAI Evals", rest | {_named("messages", "prompt", row["input"]): row["input"]}
    if isinstance(row.get("conversations"), list) and "messages" not in row:
        return "ShareGPT", _answered(row | {"messages": [_turn(one) for one in row["conversations"]]})
    if isinstance(row.get("instruction"), str) and isinstance(row.get("input"), str) and row["input"]:
        return "Alpaca", row | {"prompt": f"{row['instruction']}\n\n{row['input']}"}
    answered = isinstance(row.get("messages"), list) and _ends_with_answer(row["messages"])
    if answered and "reference" not in row and "response" not in row:
        return "OpenAI fine-tuning", _answered(row)
    return None, row


def pick(row: Row, reading: Reading) -> tuple[Row, dict[str, str]]:
    """Returns the fields of a flat row, and the column that each was taken from. Empty cells are no fields."""
    missing = [column for column in reading.columns.values() if column not in row]
    if missing:
        raise ValueError(f"no column {', '.join(map(json.dumps, missing))}; there are {_listed(row)}")
    taken = set(reading.columns.values())
    found = dict(reading.columns)
    for name in FIELDS:
        usual = (name, *_USUAL.get(name, ()))
        column = next((one for one in usual if _holds(row.get(one)) and one not in taken), None)
        if name not in found and column is not None:
            found[name] = column
    if {"messages", "prompt"} <= found.keys():
        del found["messages" if "prompt" in reading.columns else "prompt"]
    for column in _ANSWERS:
        name = "response" if "label" in found else "reference"
        if name not in found and _holds(row.get(column)) and column not in taken:
            found[name] = column
    if "label" in found and "response" not in found and row.get("response") == "":
        found["response"] = "response"  # an empty answer is one
    fields = {name: row[column] for name, column in found.items()}
    if "verifier" not in fields and reading.verifier is not None:
        fields["verifier"] = reading.verifier
    return {name: value for name, value in fields.items() if _holds(value) or name == "response"}, found


def label_of(value: Any) -> int | str:
    """1, 0 or `UNKNOWN`. Raises ValueError with what was expected."""
    found = _WORDS.get(str(value).strip().casefold()) if isinstance(value, str | int | float) else None
    if found is None:
        raise ValueError(
            '"label" must be 1 or 0, true or false, right or wrong, yes or no, correct or incorrect, pass or fail, '
            f"or unknown; not {json.dumps(value, default=str)}"
        )
    return found


def messages_of(value: Any) -> Any:
    """A conversation that a table keeps as text, JSON or Python's; anything else as it is."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError('"messages" is a text that is no JSON; a single question goes into the column "prompt"')


def _holds(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _listed(row: Row) -> str:
    return ", ".join(json.dumps(name) for name in row)


def _named(of_list: str, of_text: str, value: Any) -> str:
    return of_list if isinstance(value, list) else of_text


def _turn(one: Any) -> Any:
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(one, dict) or "from" not in one:
        return one
    return {"role": roles.get(one["from"], one["from"]), "content": one.get("value")}


def _ends_with_answer(messages: Sequence[Any]) -> bool:
    last = messages[-1] if messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _answered(row: Row) -> Row:
    """A conversation without its last answer, which is the reference, or the response where a label is given."""
    if not _ends_with_answer(row["messages"]):
        return row
    *before, last = row["messages"]
    answer = last.get("content")
    if answer is None:
        raise ValueError("the last message calls a tool or says nothing; only texts can be judged")
    return {"answer": answer, **row, "messages": before}


def _agreed(values: Sequence[Any]) -> Any:
    """What more than half of the annotators said, else unknown; None where nobody said anything."""
    if not values:
        return None
    said = Counter(json.dumps(value, sort_keys=True, default=str) for value in values)
    text, count = said.most_common(1)[0]
    return json.loads(text) if 2 * count > len(values) else UNKNOWN


def _label_studio(row: Row) -> Row:
    said: dict[str, list[Any]] = {}
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        for result in annotation.get("result") or ():
            value = result.get("value", {}).get(result.get("type"))
            one = value[0] if isinstance(value, list) and len(value) == 1 else value
            said.setdefault(str(result.get("from_name")), []).append(one)
    rest = {"id": row.get("id"), **row["data"]}
    return rest | {name: _agreed(values) for name, values in said.items()}


def _argilla(row: Row) -> Row:
    said: dict[str, list[Any]] = {}
    responses = row["responses"] or {}
    if isinstance(responses, list):  # a FeedbackDataset: one entry a user, with all questions
        for one in responses:
            for name, value in (one.get("values") or {}).items():
                said.setdefault(name, []).append(value.get("value") if isinstance(value, dict) else value)
    else:
        for name, ones in responses.items():
            said[name] = [one["value"] for one in ones if one.get("status", "submitted") == "submitted"]
    rest = {"id": row.get("id") or row.get("external_id"), **(row.get("metadata") or {}), **row["fields"]}
    return rest | {name: _agreed(values) for name, values in said.items()}


def _argilla_flat(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name.endswith(".responses"):
            status = row.get(f"{name}.status") or ["submitted"] * len(value or ())
            said = [
                one for one, state in zip(value or (), status, strict=True) if state in (None, "submitted")
            ]
            flat[name.removesuffix(".responses")] = _agreed(said)
        elif ".responses." not in name and ".suggestion" not in name:
            flat[name] = value
    return flat
