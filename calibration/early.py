"""Whatever can be known before a model starts is checked before it does: seconds, not after the last answer.

Later, `Watch` looks at the first answers, which tell what thousands of others would.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import ceil, floor, log
from pathlib import Path
from tempfile import TemporaryFile

from candor.calibration.cache import AnswerCache, CachedAnswer
from candor.calibration.data import Record
from candor.calibration.errors import CalibrationError, DataError, VerifierError
from candor.calibration.generate import close_verifiers
from candor.calibration.labels import label, verifier_of
from candor.calibration.verifiers import Verdict
from candor.policy.policy import Policy
from candor.sdm.region import minimum_points

BYTES_BESIDE_H = 2_000
"""Of one answer in the cache: its text, its key and SQLite's own."""
SPARE_BYTES = 50_000_000
FIRST = 50
"""Answers after which is said what most of them have in common."""


def require_writable(folder: Path, what: str) -> None:
    """Raises CalibrationError unless files can be made in `folder`, or where it would be created."""
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CalibrationError(
            f"{what} {folder} cannot be written: {error.strerror}; choose another place"
        ) from error


def require_disk(folder: Path, answers: int, width: int, policy: Policy) -> None:
    """Raises CalibrationError where answers and bundle would fill the disk. width: numbers in h."""
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    needed = answers * policy.resample * (4 * width + BYTES_BESIDE_H) + SPARE_BYTES
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CalibrationError(
            f"{answers} records need about {needed / 1e6:,.0f} MB in {folder}, and {free / 1e6:,.0f} MB are free: "
            "free some, or name another folder with --hidden-cache"
        )


def records_needed(alpha: float, certify_share: float, held_out_share: float) -> int:
    """The fewest prompts with which there can be a region, half of them right: what both classes need in both halves.

    certify_share, held_out_share: set aside first, and of the rest; rounding may leave two more than their rest. More
    are needed where one class is rarer.
    """
    both = 4 * minimum_points(alpha) - 2
    return floor(both / ((1 - certify_share) * (1 - held_out_share))) + 1


def certificate_needs(accuracy: float, delta: float) -> int:
    """Answers let through, all of them right, that show this accuracy: ceil(log delta / log accuracy)."""
    return ceil(log(delta) / log(accuracy) - 1e-9)


def require_enough(
    records: Sequence[Record], alpha: float, certify_share: float, held_out_share: float, what: str
) -> None:
    """Raises DataError where no answers whatever could give a region at alpha, or where all labels are the same."""
    prompts = len({record.prompt_digest for record in records})
    needed = records_needed(alpha, certify_share, held_out_share)
    if prompts < needed:
        raise DataError(
            f"{what} has {prompts} prompts, and a region at alpha = {alpha} takes at least {needed}: "
            f"{minimum_points(alpha):g} right and as many wrong ones in each of two halves, beside what is set aside "
            "to report and certify on. A few hundred are a beginning. Add records, or lower alpha"
        )
    labels = {record.label for record in records}
    if len(labels) == 1 and None not in labels:
        kind = "right" if 1 in labels else "wrong"
        raise DataError(
            f"all {len(records)} answers in {what} are labelled {kind}: a layer learns to tell right from wrong, so "
            "add records of the other kind"
        )


def try_verifiers(records: Sequence[Record], cache: Path | None = None) -> None:
    """Asks each verifier once, about an answer that is one: the reference, or the word "nothing".

    cache: the folder where its verdict is kept, so that it is not paid for in the next run too.
    Raises DataError, which names the record, where it fails.
    """
    first: dict[str | None, Record] = {}
    for record in records:
        if verifier_of(record) is not None:
            first.setdefault(record.verifier, record)

    async def tried() -> None:
        try:
            for record in first.values():
                answer = record.reference if isinstance(record.reference, str) else "nothing"
                try:
                    with nullcontext() if cache is None else AnswerCache(cache) as kept:
                        await label(record, record.response or answer, kept)
                except VerifierError as error:
                    raise DataError(
                        f'{record.place} (id "{record.id}"), tried before any answer: {error}'
                    ) from error
        finally:
            await close_verifiers(records)

    asyncio.run(tried())


@dataclass
class Watch:
    """Says once, after the first answers, what is probably not meant: most are cut off, or all have one label.

    records: how many there will be. tell: prints a line.
    """

    records: int
    max_tokens: int
    tell: Callable[[str], object] = lambda line: print(line, file=sys.stderr)
    seen: int = 0
    cut: int = 0
    labels: list[Verdict] = field(default_factory=list)
    last: tuple[Record, str] | None = None

    def __call__(self, record: Record, answer: CachedAnswer, verdict: Verdict) -> None:
        if record.response is not None:
            return
        self.seen += 1
        self.cut += answer.truncated
        self.labels.append(verdict)
        if not answer.truncated or self.last is None:
            self.last = record, answer.response
        if self.seen == min(FIRST, self.records):
            for line in self.warnings():
                self.tell(line)

    def warnings(self) -> list[str]:
        said = []
        if self.cut > self.seen / 4:
            said.append(
                f"{self.cut} of the first {self.seen} answers are cut off at {self.max_tokens} tokens, and cut ones "
                "are never let through: raise --max-tokens, or have the prompt ask for a short answer"
            )
        kinds = set(self.labels)
        if len(kinds) == 1 and self.seen >= FIRST and self.last is not None:
            kind = {True: "right", False: "wrong", None: "of unknown label"}[self.labels[0]]
            record, response = self.last
            said.append(
                f"the first {self.seen} answers are all {kind} by verifier {record.verifier}; for example "
                f"{record.id}: answer {_short(response)}, reference {_short(record.reference)}"
            )
        return said


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def certificate_hope(prompts: int, share: float, accuracy: float, delta: float) -> str | None:
    """A sentence where the records set aside cannot certify anything; None where they may."""
    needed, apart = certificate_needs(accuracy, delta), int(prompts * share)
    if apart >= needed:
        return None
    more = ceil(needed / share)
    return (
        f"{apart} prompts are set aside to certify on, and {accuracy} at delta {delta} takes at least {needed} that "
        f"are answered, without an error: there will be no certificate. {more} records in all are the least; at a "
        f"third answered {3 * more}"
    )
