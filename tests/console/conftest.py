"""A real server with the demo's model and keys, and a real browser that looks at its console.

The server starts soonest with the transformers engine; CANDOR_ENGINE=vllm takes the other.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from candor.app.edge.keys import make_key

ROOT = Path(__file__).resolve().parents[2]
_START_S = 1800


@dataclass(frozen=True)
class Served:
    """A server that listens. key: one that may do everything."""

    url: str
    key: str


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. Of a module and not of the session: while it runs, so does an event loop in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    sandbox = os.geteuid() != 0  # which root has not
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory, chromium: Any) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("console")
    key, kept = make_key("console", ["answer", "feedback", "operate"])
    (folder / "keys").write_text(kept.line(), encoding="utf-8")
    command = [sys.executable, "-c", "from candor.app.cli import main; main()", "serve"]
    command += ["--model", str(demo_model), "--bundle", str(ROOT / "demo/bundle"), "--port", "0"]
    settings = {"CANDOR_KEYS": str(folder / "keys"), "CANDOR_STORE": str(folder / "feedback.db")}
    environment = {"CANDOR_ENGINE": "transformers"} | os.environ | settings | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            yield Served(_address(process, folder / "log"), key)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    pause = threading.Event()
    for _ in range(10 * _START_S):
        text = log.read_text(encoding="utf-8")
        if ready := re.search(r"ready url=(\S+)", text):
            return ready[1]
        assert process.poll() is None, text
        pause.wait(0.1)
    pytest.fail(f"the server did not start within {_START_S} s:\n{log.read_text(encoding='utf-8')}")


@pytest.fixture
def open_page(chromium: Any, server: Served) -> Iterator[Callable[..., Any]]:
    """Opens the console as a reader with a key sees it, or without. Whatever the browser complains of fails."""
    complaints: list[str] = []
    contexts = []

    def open_(*, key: str | None = server.key, **look: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1360, "height": 900}, **look})
        contexts.append(context)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('candor.key', {key!r})")
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.goto(f"{server.url}/console")
        if key is not None:
            page.wait_for_selector("#answer-counts tr")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [one for one in complaints if "status of 401" not in one] == []
