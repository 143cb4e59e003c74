"""Why an engine did not start, told by the process where it failed.

vLLM logs the error in that process and tells the one that waits no more than that there was one. So each of its
processes writes the errors it logs to a file as well, whose path the environment carries to them.
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
    """The file, for as long as an engine starts; empty as long as nothing failed."""
    with tempfile.TemporaryDirectory(prefix="candor-") as folder:
        file = Path(folder) / "failures"
        file.touch()
        os.environ[VARIABLE] = str(file)
        try:
            yield file
        finally:
            del os.environ[VARIABLE]


def report_here() -> None:
    """From now on, errors that vLLM logs in this process go to the file too."""
    logger = logging.getLogger("vllm")
    if (path := os.environ.get(VARIABLE)) and not any(isinstance(one, _ToFile) for one in logger.handlers):
        logger.addHandler(_ToFile(Path(path)))


def first_cause(file: Path) -> str | None:
    """The first error's sentence; those after it are mostly its consequences."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[0] if lines else None


def sentence(error: BaseException) -> str:
    """What it says, in one line; of pydantic's errors without the values that they were given."""
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
    """Writes the exceptions that are logged, one line each, as long as the file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._file.exists():
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(sentence(error) + "\n")
