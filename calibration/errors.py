"""The errors of calibration. Each message says what to do about it.

CalibrationError
├── DataError       the labelled data cannot be used; names lines
├── VerifierError   a verifier could not be loaded, or failed on an answer
└── CacheError      the cache of finished answers cannot be read or written
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHOWN = 10
"""How many problems one message lists; the rest are counted."""


class CalibrationError(Exception):
    """Calibration cannot go on; the message says what was expected, what came and what to do."""


class DataError(CalibrationError):
    """The labelled data cannot be used."""

    @classmethod
    def from_problems(cls, where: Path | str, problems: Sequence[str], remedy: str) -> DataError:
        """Makes one message of many problems: the first `SHOWN`, how many in all, and the remedy."""
        lines = [f"{where}: {len(problems)} problem{'s' if len(problems) != 1 else ''}"]
        lines += [f"  {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"  ... and {len(problems) - SHOWN} more")
        return cls("\n".join([*lines, remedy]))


class VerifierError(CalibrationError):
    """A verifier could not be loaded, or failed on an answer."""


class CacheError(CalibrationError):
    """The cache of finished answers cannot be read or written."""
