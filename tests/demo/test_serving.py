"""The main job, as a user meets it: `candor serve` with vLLM, the demo's model and bundle, and stock clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish

ROOT = Path(__file__).resolve().parents[2]
CANDOR = Path(sys.executable).with_name("candor")
ORDERED = (
    "Finish the sentence with the words in the right order.\n"
    "Sentence: The children ran home before the\nWords: began. storm"
)
STRANGE = "Wie wird das Wetter morgen in Berlin?"


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())


def start(demo_model: Path, log: Path, bundle: Path = ROOT / "demo/bundle", **settings: str) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"CANDOR_EAGER": "true", "CANDOR_KV_CACHE_BYTES": str(1 << 28)} | settings
    with log.open("wb") as output:
        process = subprocess.Popen(
            [CANDOR, "serve", "--model", demo_model, "--bundle", bundle, "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.get("/readyz")
        except OSError:
            time.sleep(0.5)
        else:
            return server
    process.kill()
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def end(server: Server) -> None:
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a bundle that lets nothing through as its shadow."""
    folder = tmp_path_factory.mktemp("serve")
    demo = load_bundle(Path(shutil.copytree(ROOT / "demo/bundle", folder / "demo")))
    assert demo.rule is not None
    strict = [replace(one, score_min=1e6) for one in demo.rule.terms.certificates]
    manifest = replace(demo.manifest, rule=replace(demo.rule.terms, certificates=tuple(strict)), files={})
    publish(folder / "strict", manifest, demo.estimator, demo.exemplars, demo.report, demo.rule.rule)
    server = start(demo_model, folder / "log", folder / "demo", CANDOR_SHADOW=str(folder / "strict"))
    yield server
    end(server)


def ask(server: Server, text: str, **reliability: object) -> openai.types.chat.ChatCompletion:
    return server.client.chat.completions.create(
        model="word-ordering",
        messages=[{"role": "user", "content": text}],
        extra_body={"reliability": reliability},
    )


def result_of(answer: openai.types.chat.ChatCompletion) -> dict[str, object]:
    (result,) = answer.model_dump()["reliability"]["results"]
    return dict(result)


def test_an_ordered_sentence_is_reliable(server: Server) -> None:
    answer = ask(server, ORDERED, exemplars=2)
    result = result_of(answer)
    assert answer.choices[0].message.content == (
        "<sentence>The children ran home before the storm began.</sentence>"
    )
    assert answer.choices[0].finish_reason == "stop"
    assert (result["region"], result["abstained"], result["prediction"]) == ("high", False, 1)
    assert len(result["exemplars"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["annotate", "abstain"])
def test_a_strange_prompt_is_not(server: Server, mode: str) -> None:
    answer = ask(server, STRANGE, mode=mode)
    result = result_of(answer)
    assert result["region"] in ("ood", "low")
    assert result["abstained"] is True
    assert (answer.choices[0].message.content is None) == (mode == "abstain")
    assert bool(answer.choices[0].message.refusal) == (mode == "abstain")


def test_a_stream_says_the_same_and_shows_no_tag(server: Server) -> None:
    whole = ask(server, ORDERED)
    chunks = list(
        server.client.chat.completions.create(
            model="word-ordering",
            messages=[{"role": "user", "content": ORDERED}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    (finish,) = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finish.model_dump()["reliability"]["results"][0]["region"] == result_of(whole)["region"]
    assert chunks[-1].usage is not None


def test_another_temperature_is_not_calibrated(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="word-ordering", messages=[{"role": "user", "content": ORDERED}], temperature=0.7, seed=3
    )
    result = result_of(answer)
    assert result["calibrated"] is False
    assert result["region"] != "high"


def test_a_given_pair_is_scored_as_the_answer_was(server: Server) -> None:
    answered = ask(server, ORDERED)
    body = {
        "messages": [{"role": "user", "content": ORDERED}],
        "response": answered.choices[0].message.content,
    }
    request = urllib.request.Request(
        server.url + "/v1/reliability",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        scored = json.load(response)
    (result,) = scored["reliability"]["results"]
    assert result["prediction"] == result_of(answered)["prediction"]
    assert result["region"] == result_of(answered)["region"]


def test_metrics_of_candor_and_of_vllm_stand_together(server: Server) -> None:
    ask(server, ORDERED)
    metrics = server.get("/metrics")
    assert 'sdm_answers_total{alpha="0.9",decision="answered",model_name="word-ordering"' in metrics
    assert "vllm:request_success_total" in metrics


def test_a_bundle_shadows_and_is_promoted_pinned_and_rolled_back(server: Server) -> None:
    def in_use() -> dict[str, Any]:
        return dict(json.loads(server.get("/bundles"))["data"][0])

    def change(name: str) -> None:
        command = [CANDOR, name, "--url", server.url]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    old, strict = in_use()["bundle"], in_use()["shadow"]["bundle"]
    assert result_of(ask(server, ORDERED, bundle=old))["abstained"] is False
    deadline = time.monotonic() + 20
    while not in_use()["shadow"]["decisions"]["answered"]["abstained"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    change("promote")
    assert (in_use()["bundle"], in_use()["previous"]) == (strict, old)
    assert result_of(ask(server, ORDERED, bundle=strict))["abstained"] is True
    with pytest.raises(openai.ConflictError, match="answers here"):
        ask(server, ORDERED, bundle=old)
    change("rollback")
    assert result_of(ask(server, ORDERED, bundle=old))["abstained"] is False


def test_it_ends_cleanly_when_told_to(demo_model: Path, tmp_path: Path) -> None:
    server = start(demo_model, tmp_path / "log")
    try:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
    finally:
        end(server)


def test_a_dead_engine_ends_the_process_with_an_error(demo_model: Path, tmp_path: Path) -> None:
    server = start(demo_model, tmp_path / "log")
    try:
        engines = subprocess.run(
            ["pgrep", "-s", str(os.getsid(server.process.pid)), "-f", "EngineCore"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        assert engines
        for pid in engines:
            os.kill(int(pid), signal.SIGKILL)
        assert server.process.wait(timeout=60) not in (0, None)
    finally:
        end(server)
