"""SIGTERM at any moment ends a command and all that it started, also what does not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
"""A child with a grandchild that is deaf, as vLLM's engine has workers."""

COMMAND = f"""
import subprocess, sys, time
from candor.app.process.ending import ending_children
with ending_children(143, within_s=2):
    child = subprocess.Popen([sys.executable, "-c", {PARENT!r}], stdout=subprocess.PIPE)
    print(child.pid, int(child.stdout.readline()), flush=True)
    WHAT_IT_DOES
"""


@pytest.mark.parametrize(
    "then",
    [
        "time.sleep(600)",
        "try: time.sleep(600)\n    finally: child.kill(); child.wait()",
        # What is raised is lost, as under C code that calls back.
        "while True:\n        try: time.sleep(600)\n        except SystemExit: pass",
    ],
    ids=["waiting", "orphaned", "stuck"],
)
def test_no_process_is_left(then: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.replace("WHAT_IT_DOES", then)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        started = [int(word) for word in command.stdout.readline().split()]
        assert len(started) == 2
        try:
            time.sleep(0.2)
            began = time.monotonic()
            command.send_signal(signal.SIGTERM)
            assert command.wait(timeout=20) == 143
            assert time.monotonic() - began < 8
            assert [pid for pid in started if _runs(pid)] == []
        finally:
            for pid in started:
                if _runs(pid):
                    os.kill(pid, signal.SIGKILL)


def test_left_in_peace_nothing_is_killed() -> None:
    code = (
        "import signal, subprocess\nfrom candor.app.process.ending import ending_children\n"
        "with ending_children(143):\n    child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.poll(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\nchild.kill(); child.wait()"
    )
    assert printed(code) == "None True\n"


def test_what_ran_before_runs_on() -> None:
    """Of a program that runs a command in its own process, as these tests do with their databases."""
    code = (
        "import os, signal, subprocess, psutil\nfrom candor.app.process.ending import ending_children\n"
        "before = subprocess.Popen(['sleep', '600'])\ntry:\n    with ending_children(143, within_s=1):\n"
        "        ours = subprocess.Popen(['sleep', '600'])\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "except SystemExit as ended:\n    print(ended.code, before.poll(), psutil.pid_exists(ours.pid))\n"
        "before.kill(); before.wait()"
    )
    assert printed(code) == "143 None False\n"


def test_pythons_own_helper_is_left_to_clear_up() -> None:
    code = (
        "import os, signal, time, psutil\nfrom multiprocessing import resource_tracker\n"
        "from candor.app.process.ending import ending_children\n"
        "try:\n    with ending_children(143, within_s=1):\n        resource_tracker.ensure_running()\n"
        "        time.sleep(0.3)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "except SystemExit as ended:\n    print(ended.code, len(psutil.Process().children()))"
    )
    assert printed(code) == "143 1\n"


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
