"""`candor bundle verify` and `show`, as they are typed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from candor.app.commands.bundle import bundle_app
from candor.model_store.manifest import MANIFEST, REPORT, FileEntry

Files = dict[str, bytes]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, files: Files, write: Callable[[Path, Files], Path]) -> Path:
    return write(tmp_path / "bundle", files)


def test_verify(folder: Path, files: Files) -> None:
    result = CliRunner().invoke(bundle_app, ["verify", str(folder)])
    assert result.exit_code == 0
    assert result.stdout == f"{folder}: whole, 40 exemplars, digest {FileEntry.of(files[MANIFEST]).sha256}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_damaged_bundle(folder: Path, command: str) -> None:
    (folder / REPORT).unlink()
    (folder / "notes").touch()
    result = CliRunner().invoke(bundle_app, [command, str(folder)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "report.json: expected a file, got nothing" in result.stderr
    assert "'notes': expected no such file, got a file" in result.stderr
    assert "Traceback" not in result.stderr


def test_show(folder: Path) -> None:
    result = CliRunner().invoke(bundle_app, ["show", str(folder)])
    assert result.exit_code == 0
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    shown = {key: value.strip() for key, value in lines.items()}
    assert shown["name"] == "demo"
    assert shown["adapter"] == "order, dddddddddddd"
    assert shown["representation"] == "mean 4 + last 4 + evidence 3 = 11, at the last token of <verified>"
    assert shown["policy"] == "temperature 0, top_p 1, top_k 0, max_tokens 64"
    assert shown["classes"] == "0 = wrong, 1 = right"
    assert shown["support"] == "40 rows of 5: wrong 20, right 20"
    assert shown["region at 0.9"].startswith("rescaled similarity from ")
    assert "region at 0.95" in shown
    assert shown["certified at 0.9, lower"] == (
        "accuracy 0.95 with confidence 0.95, rescaled similarity from 250.0: 119 of 120 answered were right"
    )


def test_importing_the_command_loads_nothing_heavy() -> None:
    check = (
        "import sys, candor.app.commands.bundle\n"
        "sys.exit('torch' in sys.modules or 'candor.model_store' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
