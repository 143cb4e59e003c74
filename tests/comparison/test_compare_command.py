"""What `candor evaluate --compare` is told wrongly is said before any file is read or engine started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from candor.app.commands.evaluate import evaluate
from candor.calibration.cache import CachedAnswer
from candor.calibration.data import Record
from candor.calibration.errors import DataError
from candor.comparison.run import _same_as
from candor.model_store.bundle import Exemplar


def run(*arguments: object) -> Result:
    commands = typer.Typer()
    commands.command()(evaluate)
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compare", "all"), "--compare needs --calibration"),
        (("--compare", "softmax,mood", "--calibration", "d.jsonl"), "unknown methods ['mood']"),
        (("--compare", "", "--calibration", "d.jsonl"), "give all, or some of no_reject"),
        (("--compare", "all", "--calibration", "d.jsonl", "--ensemble", "1"), "--ensemble"),
        (("--compare", "all", "--calibration", "d.jsonl"), "there is no bundle"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # so that rich does not break the lines that are looked for
    monkeypatch.setenv("NO_COLOR", "1")
    result = run(
        "--bundle", tmp_path / "none", "--model", tmp_path, "--data", tmp_path / "t.jsonl", *arguments
    )
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert isinstance(result.exception, SystemExit)  # told, not a traceback
    assert list(tmp_path.iterdir()) == []


def test_another_machines_answers_are_told_at_the_first_not_after_all() -> None:
    question = ({"role": "user", "content": "q"},)
    bundle: Any = SimpleNamespace(exemplars=[Exemplar("a", 1, 1, question, "Paris")])
    watch = _same_as(bundle)
    a, b = (Record(name, question, 7, reference="Paris", verifier="exact") for name in "ab")
    h = torch.zeros(1)
    watch(a, CachedAnswer("Paris", False, h), True)
    watch(b, CachedAnswer("Rome", False, h), False)
    with pytest.raises(
        DataError, match=r"line 7: the bundle was made from the answer 'Paris', and this is 'Rome'"
    ):
        watch(a, CachedAnswer("Rome", False, h), False)
    with pytest.raises(DataError, match="was made with the label 1, and this is 0"):
        watch(a, CachedAnswer("Paris", False, h), False)
