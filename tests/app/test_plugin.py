"""`vllm serve` with Candor in it: the same answers and verdicts, and vLLM's own routes beside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN = (
    "Finish the sentence with the words in the right order.\n"
    "Sentence: The children ran home before the\nWords: began. storm"
)
ENTRIES = """[vllm.general_plugins]
candor = candor.engine.vllm_plugin:register
[vllm.endpoint_plugins]
candor = candor.app.process.plugin:Plugin
"""


@pytest.fixture(scope="module")
def client(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"VLLM_PLUGINS": "candor", "CANDOR_BUNDLE": "demo/bundle"}
    if not entry_points(group="vllm.endpoint_plugins", name="candor"):  # installed before it had any
        place = tmp_path_factory.mktemp("installed")
        (place / "entries-0.dist-info").mkdir()
        (place / "entries-0.dist-info/METADATA").write_text(
            "Metadata-Version: 2.1\nName: entries\nVersion: 0\n"
        )
        (place / "entries-0.dist-info/entry_points.txt").write_text(ENTRIES)
        environment["PYTHONPATH"] = f"{place}:{ROOT}:{environment.get('PYTHONPATH', '')}"
    options = ["--max-model-len", "1024", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28)]
    options += ["--dtype", "bfloat16", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "word-ordering"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(demo_model), *options],
        cwd=ROOT,
        env=environment,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            for _ in range(600):
                time.sleep(0.5)
                assert process.poll() is None, "the server ended"
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.ConnectError:
                    continue
            yield client
    finally:
        process.terminate()
        process.wait(60)


def ask(client: httpx.Client, **more: Any) -> Any:
    body = {"model": "word-ordering", "messages": [{"role": "user", "content": KNOWN}]} | more
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("more", [{}, {"cache_salt": "s"}], ids=["own", "by vLLM's handler"])
def test_an_answer_has_its_verdict(client: httpx.Client, more: dict[str, Any]) -> None:
    answer = ask(client, **more)
    assert "storm" in answer["choices"][0]["message"]["content"]
    assert answer["reliability"]["results"][0]["region"] == "high"


def test_what_is_withheld_stays(client: httpx.Client) -> None:
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    for more in ({}, {"cache_salt": "s"}):
        answer = ask(client, messages=asked, reliability={"mode": "abstain"}, **more)
        assert answer["choices"][0]["message"]["content"] is None
        assert answer["choices"][0]["message"]["refusal"]


def test_its_errors_and_routes_are_here_and_vllms_own_stay(client: httpx.Client) -> None:
    body = {"model": "word-ordering", "messages": [{"role": "user", "content": "a"}], "reliabilty": {}}
    refused = client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reliabilty")
    assert client.get("/v1/reliability").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["reliability"]["bundle"]
    assert "vllm:" in client.get("/metrics").text
    assert client.post("/v1/chat/completions/render", json=body).status_code == 404
    assert client.get("/kv_event_sources").status_code != 404  # a route of vLLM's alone
