"""Why an engine did not start comes from the process where it failed, first cause first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from candor.engine.start_failures import VARIABLE, collecting, first_cause, sentence

FAILING = """
import logging, sys
from candor.engine.start_failures import report_here
report_here()
report_here()  # worker and scheduler may stand in one process
try:
    raise ValueError(sys.argv[1])
except ValueError:
    logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
logging.getLogger("vllm.v1").error("no exception")
"""


def fail(saying: str) -> None:
    subprocess.run([sys.executable, "-c", FAILING, saying], check=True, capture_output=True)


def test_the_first_of_several_processes_is_told() -> None:
    with collecting() as failures:
        assert first_cause(failures) is None
        fail("No memory\nfor the KV cache.")
        fail("A worker failed.")
        assert failures.read_text(encoding="utf-8").count("\n") == 2
        assert first_cause(failures) == "No memory for the KV cache."
    assert not failures.exists()
    assert VARIABLE not in os.environ


def test_once_started_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail("nobody asks")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    fail("nobody asks any more")
    assert list(tmp_path.iterdir()) == []


def test_a_sentence_is_one_line_without_values() -> None:
    class Config(BaseModel):
        heads: int

        @field_validator("heads")
        @classmethod
        def _divides(cls, value: int) -> int:
            raise ValueError("4 must be divisible by tensor parallel size (3)")

    with pytest.raises(ValidationError) as refused:
        Config(heads=4)
    assert sentence(refused.value) == "heads: 4 must be divisible by tensor parallel size (3)"
    assert sentence(RuntimeError()) == "RuntimeError"
    assert sentence(OSError("a\n  b")) == "a b"
