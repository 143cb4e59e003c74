"""Reads the pairs to fine-tune on, one JSON object per line; every line is checked before training.

    {"id", "messages", "reference", "verifier", "positive", "negative"}

`positive` is an answer that follows the instruction, `negative` one that does not (both without the
verification tag, which is added). `reference` and `verifier` decide whether an answer that the
model itself generates is right (calibration.verifiers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from candor.calibration.data import parse_lines, prompt_digest, read_messages
from candor.calibration.errors import DataError, VerifierError
from candor.calibration.shapes import messages_of
from candor.calibration.verifiers import load_verifier, reference_problem

FIELDS = frozenset({"id", "messages", "reference", "verifier", "positive", "negative"})
REMEDY = f"Every line is one JSON object with {', '.join(sorted(FIELDS))}. Correct these lines and run again."


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


def load_pairs(path: Path) -> list[Pair]:
    """Reads the pairs. Raises a DataError that lists the invalid lines, or says that the file is empty."""
    return parse_lines(path, partial(_parse, folder=path.parent), REMEDY)


def require_apart(path: Path, pairs: Sequence[Pair], other_path: Path, others: Sequence[Pair]) -> None:
    """Raises DataError if a prompt is in both files: the checkpoint would be chosen on training prompts."""
    seen = {prompt_digest(pair.messages) for pair in pairs}
    if shared := [pair.id for pair in others if prompt_digest(pair.messages) in seen]:
        raise DataError(
            f"expected other prompts in {other_path} than in {path}, but {len(shared)} are the same, "
            f'first "{shared[0]}": remove them from one of the two'
        )


def _parse(fields: dict[str, Any], _line: int, folder: Path) -> Pair:
    missing, unknown = sorted(FIELDS - fields.keys()), sorted(fields.keys() - FIELDS)
    if missing or unknown:
        raise ValueError(f"missing {missing}, unknown {unknown} (expected {', '.join(sorted(FIELDS))})")
    for name in ("id", "verifier", "positive", "negative"):
        if not isinstance(fields[name], str) or (name != "negative" and not fields[name]):
            raise ValueError(f'"{name}" must be a non-empty string')
    try:
        load_verifier(fields["verifier"], folder)
    except VerifierError as error:
        raise ValueError(str(error)) from error
    if problem := reference_problem(fields["verifier"], fields["reference"]):
        raise ValueError(problem)
    made = Pair(**(fields | {"messages": read_messages(messages_of(fields["messages"]))}), folder=folder)
    if not made.is_right(made.positive):
        raise ValueError(f'"positive" is wrong by verifier "{made.verifier}"')
    if made.is_right(made.negative):
        raise ValueError(f'"negative" is right by verifier "{made.verifier}"')
    return made
