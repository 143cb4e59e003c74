"""SIGTERM at any moment of serve, calibrate and evaluate leaves no process of theirs behind within ten seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.model, pytest.mark.faults]

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 10
MOMENTS_S = (0.5, 3.0, 8.0, 15.0, 25.0, 40.0)
"""After the start: imports, vLLM's configuration, its processes, its weights; then answers are under way."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than are answered within the longest moment."""
    file = tmp_path_factory.mktemp("data") / "records.jsonl"
    asked = (
        "Finish the sentence with the words in the right order.\n"
        "Sentence: Boat {} sailed to the\nWords: harbor. old"
    )
    lines = (
        {
            "id": f"boat-{i}",
            "messages": [{"role": "user", "content": asked.format(i)}],
            "reference": f"<sentence>Boat {i} sailed to the old harbor.</sentence>",
            "verifier": "exact",
        }
        for i in range(5000)
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("after_s", MOMENTS_S)
@pytest.mark.parametrize("command", ["serve", "calibrate", "evaluate"])
def test_no_process_is_left(
    command: str, after_s: float, demo_model: Path, records: Path, tmp_path: Path
) -> None:
    bundle = ["--bundle", str(ROOT / "demo/bundle")]
    data = ["--data", str(records), "--eager"]
    arguments = {
        "serve": [*bundle, "--port", str(_free_port())],
        "calibrate": [*data, "--alpha", "0.9", "--out", str(tmp_path / "bundle")],
        "evaluate": [*bundle, *data, "--hidden-cache", str(tmp_path / "answers")],
    }[command]
    with subprocess.Popen(
        [sys.executable, "-m", "candor.app.cli", command, "--model", str(demo_model), *arguments],
        cwd=ROOT,
        env=os.environ | {"CANDOR_EAGER": "true", "CANDOR_SHUTDOWN_DELAY_S": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            time.sleep(after_s)
            assert process.poll() is None, "it ended by itself"
            running = len(list(_of_session(process.pid)))
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            while process.poll() is None or list(_of_session(process.pid)):
                assert time.monotonic() - began < WITHIN_S, list(_of_session(process.pid))
                time.sleep(0.05)
            print(f"\n{command}, after {after_s:g} s, {running} processes: {time.monotonic() - began:.1f} s")
        finally:
            for one in _of_session(process.pid):
                one.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _of_session(leader: int) -> Iterator[psutil.Process]:
    """Processes of the command's session that are still alive, whoever their parent is by now."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
