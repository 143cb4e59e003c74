"""How often a verifier agrees with people, and what a certificate must show so that it speaks of people's labels.

A verifier that errs (a judge, a heuristic) is asked about answers that people labelled. Of those it calls right,
people call some wrong; let e be the exact upper bound of that share at delta / 2. Write R for "the verifier says
right", H for "people do", both among what is let through. Since

    P(H) >= P(R) (1 - P(not H | R)),

an accuracy by people of a at delta is shown by an accuracy by the verifier of a / (1 - e) at delta / 2: if the
verifier errs on what is let through no more often than on what people labelled. So people should label answers like
those that will be let through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from candor.calibration.cache import AnswerCache
from candor.calibration.certificate import Claim
from candor.calibration.data import Record
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.generate import close_verifiers
from candor.calibration.intervals import lower_bound
from candor.calibration.labels import label
from candor.calibration.verifiers import without_folders


@dataclass(frozen=True)
class Agreement:
    """called_right, called_wrong: by the verifier. wrong_of_right: those called right that people call wrong;
    right_of_wrong: the reverse. unknown: of which the verifier could not say."""

    verifier: str
    called_right: int
    wrong_of_right: int
    called_wrong: int
    right_of_wrong: int
    unknown: int

    def error_bound(self, delta: float) -> float:
        """e: with confidence 1 - delta, at most this share of what the verifier calls right is wrong; delta < 0.5."""
        if self.called_right == 0:
            return 1.0
        return 1 - lower_bound(self.called_right - self.wrong_of_right, self.called_right, delta)

    def by_verifier(self, wanted: Claim) -> Claim:
        """The claim to test by the verifier's labels, so that `wanted` holds by people's.

        Raises CalibrationError where none can be shown.
        """
        e = self.error_bound(wanted.delta / 2)
        if wanted.accuracy >= 1 - e:
            raise CalibrationError(
                f"{self}. So no certificate of {wanted.accuracy} by people's labels can be shown through it: have "
                "people label more answers, or mend the rubric; without --human, certificates speak of the "
                "verifier's labels"
            )
        return Claim(wanted.accuracy / (1 - e), wanted.delta / 2)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verifier": without_folders(self.verifier)}

    def __str__(self) -> str:
        e = self.error_bound(0.05)
        said = (
            f"{self.verifier} called {self.called_right} of people's answers right, of which people call "
            f"{self.wrong_of_right} wrong (at most {e:.1%}, with confidence 95 %), and {self.called_wrong} wrong, of "
            f"which people call {self.right_of_wrong} right"
        )
        return said + (f"; of {self.unknown} it could not say" if self.unknown else "")


def agreement(records: Sequence[Record], verifier: str, folder: Path) -> Agreement:
    """Asks `verifier` about answers with labels of people's, and keeps its verdicts in the cache `folder`.

    Raises DataError where a record has no label; VerifierError or CacheError.
    """
    bare = [record for record in records if record.label is None or record.response is None]
    if bare:
        raise DataError(
            f'{bare[0].place} (id "{bare[0].id}") has no response with a label by people: --human needs both'
        )
    asked = [replace(record, label=None, verifier=verifier) for record in records]

    async def ask() -> list[bool | None]:
        with AnswerCache(folder) as cache:
            try:
                return await asyncio.gather(*(label(one, one.response or "", cache) for one in asked))
            finally:
                await close_verifiers(asked)

    counted = {(said, by_people): 0 for said in (True, False, None) for by_people in (1, 0)}
    for said, record in zip(asyncio.run(ask()), records, strict=True):
        counted[said, record.label or 0] += 1
    return Agreement(
        verifier=verifier,
        called_right=counted[True, 1] + counted[True, 0],
        wrong_of_right=counted[True, 0],
        called_wrong=counted[False, 1] + counted[False, 0],
        right_of_wrong=counted[False, 1],
        unknown=counted[None, 1] + counted[None, 0],
    )
