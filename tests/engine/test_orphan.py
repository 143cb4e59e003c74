"""An engine's process does not outlive the server that started it, also where it takes no notice of SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SERVER = """
import multiprocessing, signal, sys, time
from candor.engine import orphan

def engine(deaf):
    orphan._GRACE_S = 0.5
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphan.end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    orphan.end_with_parent()  # nothing to watch: it was not started so
    multiprocessing.get_context("spawn").Process(target=engine, args=(sys.argv[1] == "deaf",)).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["listens", "deaf"])
def test_it_ends_with_the_server(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    server = subprocess.Popen(
        [sys.executable, script, kind], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    time.sleep(0.5)
    assert engine.is_running()
    assert server.poll() is None
    server.send_signal(signal.SIGKILL)
    server.wait()
    engine.wait(20)  # raises where it goes on
    server.stdout.close()
