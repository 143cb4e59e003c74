"""What `candor evaluate --compare` is told wrongly is said before any file is read or engine started."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from candor.app.commands.evaluate import evaluate


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
