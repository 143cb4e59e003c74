"""Collects the reason why an engine did not start, from the process where it failed.

vLLM logs the error in that process and tells the waiting process only that there was one. So each vLLM process also
writes the errors it logs to a file, whose path it reads from an environment variable.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

VARIABLE = "CANDOR_START_FAILURES"


@contextmanager
def collecting() -> Iterator[Path]:
    """Yields the file while an engine starts; it is empty as long as nothing has failed."""
    with tempfile.TemporaryDirectory(prefix="candor-") as folder:
        file = Path(folder) / "failures"
        file.touch()
        os.environ[VARIABLE] = str(file)
        try:
            yield file
        finally:
            del os.environ[VARIABLE]


def report_here() -> None:
    """Makes errors that vLLM logs in this process go to the file too."""
    logger = logging.getLogger("vllm")
    if (path := os.environ.get(VARIABLE)) and not any(isinstance(one, _ToFile) for one in logger.handlers):
        logger.addHandler(_ToFile(Path(path)))


def first_cause(file: Path) -> str | None:
    """Returns the first error's line; later errors are mostly consequences of it."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[0] if lines else None


def sentence(error: BaseException) -> str:
    """Returns the error's message in one line; pydantic's errors without the input values."""
    if isinstance(error, ValidationError):
        said = "; ".join(
            ".".join(map(str, fault["loc"]))
            + ": " * bool(fault["loc"])
            + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        )
    else:
        said = str(error) or type(error).__name__
    return " ".join(said.split())


class _ToFile(logging.Handler):
    """Writes logged exceptions to the file, one line each, as long as the file exists."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._file.exists():
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(sentence(error) + "\n")
