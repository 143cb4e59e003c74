"""Reads the pairs to fine-tune on; every line is checked before training.

A pair is a record as calibration reads it (`calibration.data`), of any kind of file, with two more columns:

    positive    an answer that follows the instruction; without one, the reference where that is a text
    negative    one that does not

Both are without the verification tag, which is added. `reference` and `verifier` decide whether an answer that the
model itself generates is right (`calibration.verifiers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candor.calibration.data import Loaded, Record, load, prompt_digest
from candor.calibration.errors import DataError
from candor.calibration.shapes import Reading, columns_by_field
from candor.calibration.verifiers import load_verifier

REMEDY = (
    'A pair has "prompt" or "messages", "reference", "verifier" (or --verifier), "positive" and "negative". Columns '
    'of other names are named by --columns, such as "prompt=question, negative=rejected". Correct these lines and '
    "run again."
)


@dataclass(frozen=True)
class PairReading:
    """How rows are read. positive, negative: their columns; other fields as `record` says."""

    record: Reading = field(default_factory=Reading)
    positive: str | None = None
    negative: str = "negative"

    @classmethod
    def parse(cls, columns: str, verifier: str | None = None) -> PairReading:
        """Reads "prompt=question, reference=chosen, negative=rejected". Raises ValueError."""
        named = columns_by_field(columns)
        positive, negative = named.pop("positive", None), named.pop("negative", "negative")
        return cls(Reading(named, verifier), positive, negative)


@dataclass(frozen=True)
class Pair:
    """messages: the conversation, ending with the user's message. folder: the file's, which may hold its verifier."""

    id: str
    messages: tuple[dict[str, str], ...]
    reference: Any
    verifier: str
    positive: str
    negative: str
    folder: Path | None = None

    def is_right(self, response: str) -> bool:
        """Whether the verifier says so; False where it cannot say."""
        return load_verifier(self.verifier, self.folder)(response, self.reference) is True


def load_pairs(path: Path, reading: PairReading | None = None) -> list[Pair]:
    """Reads the pairs. Raises a DataError that lists the invalid lines, or says that the file is empty."""
    reading = reading or PairReading()
    loaded = load(path, reading.record)
    pairs, problems = [], []
    for record in loaded.records:
        try:
            pairs.append(_pair(record, loaded, reading))
        except ValueError as error:
            problems.append(f"{record.place}: {error}")
    if problems:
        raise DataError.from_problems(path, problems, REMEDY)
    return pairs


def require_apart(path: Path, pairs: Sequence[Pair], other_path: Path, others: Sequence[Pair]) -> None:
    """Raises DataError if a prompt is in both files: the checkpoint would be chosen on training prompts."""
    seen = {prompt_digest(pair.messages) for pair in pairs}
    if shared := [pair.id for pair in others if prompt_digest(pair.messages) in seen]:
        raise DataError(
            f"expected other prompts in {other_path} than in {path}, but {len(shared)} are the same, "
            f'first "{shared[0]}": remove them from one of the two'
        )


def _pair(record: Record, loaded: Loaded, reading: PairReading) -> Pair:
    if record.verifier is None or record.response is not None:
        raise ValueError('a pair has "positive" and "negative" in place of "response" and "label"')
    positive, right = reading.positive or "positive", record.row.get(reading.positive or "positive")
    if reading.positive is None and right is None:
        positive = next((name for name in loaded.columns["reference"] if name in record.row), positive)
        right = record.row.get(positive)
    wrong = record.row.get(reading.negative)
    if not isinstance(right, str) or not right:
        raise ValueError(f'"{positive}" must be a non-empty string: an answer that is right')
    if not isinstance(wrong, str):
        raise ValueError(f'"{reading.negative}" must be a string: an answer that is wrong')
    made = Pair(
        record.id, record.messages, record.reference, record.verifier, right, wrong, folder=record.folder
    )
    if not made.is_right(right):
        raise ValueError(f'"{positive}" is wrong by verifier "{made.verifier}"')
    if made.is_right(wrong):
        raise ValueError(f'"{reading.negative}" is right by verifier "{made.verifier}"')
    return made
