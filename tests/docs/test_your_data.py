"""docs/your-data.md: each shape's block of records is checked by the command that stands before it."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.calibration.shapes import FIELDS
from candor.calibration.verifiers import BUILT_IN

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/your-data.md").read_text(encoding="utf-8")
SHAPES = re.findall(
    r"```\n(candor data check [^`]*?)\n```\n\n```json\n(.*?)```(?:\n\n```toml\n(.*?)```)?",
    DOCUMENT,
    re.DOTALL,
)


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            content = json.dumps({"choices": [{"message": {"content": "right"}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_there_are_six_shapes() -> None:
    assert len(SHAPES) == 6


@pytest.mark.parametrize("shape", SHAPES, ids=[shlex.split(command)[3] for command, _, _ in SHAPES])
def test_a_shape(
    shape: tuple[str, str, str], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, records, settings = shape
    words = shlex.split(command)
    (tmp_path / words[3]).write_text(records, encoding="utf-8")
    if settings:
        (tmp_path / "judge.toml").write_text(settings.replace("http://127.0.0.1:8001/v1", endpoint))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 1, done.output  # two records are too few, and that is all that is wrong
    assert "2 records from JSON Lines" in done.stdout
    assert "region at alpha 0.9: not possible (2 prompts" in done.stdout
    assert done.stderr == ""


def test_every_field_and_verifier_is_in_its_table() -> None:
    fields = set(re.findall(r"`(\w+)`", re.sub(r"\|[^|]*$", "", _table("| field |"), flags=re.MULTILINE)))
    assert set(FIELDS) <= fields
    verifiers = set(re.findall(r"^\| `(\w+)", _table("| `verifier` |"), re.MULTILINE))
    assert set(BUILT_IN) <= verifiers


def _table(head: str) -> str:
    return DOCUMENT[DOCUMENT.index(head) :].split("\n\n")[0]
