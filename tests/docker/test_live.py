"""A real Prometheus scrapes the real server under load: every panel finds data, every rule can be evaluated.

Takes minutes, most of them vLLM's start: `pytest -m slow tests/docker/test_live.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.slow

LOAD = 60
UNLIKE = ("What is 24 plus 88?", "Wie wird das Wetter morgen?", "Name a colour.")


@dataclass(frozen=True)
class Watched:
    """server, prometheus: where they listen. spans: what was traced so far, by trace id."""

    server: httpx.Client
    prometheus: httpx.Client
    spans: dict[str, set[str]]
    folder: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.prometheus.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return [one for one in found if one["value"][1] != "NaN"]


@pytest.fixture(scope="module")
def watched(root: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: `apt-get install prometheus`")
    folder = tmp_path_factory.mktemp("live")
    with ExitStack() as stack:
        otlp, spans = stack.enter_context(_receiver())
        settings = {
            "CANDOR_STORE": str(folder / "feedback.db"),
            "CANDOR_EAGER": "true",
            "CANDOR_KV_CACHE_BYTES": str(1 << 28),
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp,
        }
        port = _free_port()
        serve = [
            sys.executable,
            "-c",
            "from candor.app.cli import main; main()",
            "serve",
            "--port",
            str(port),
        ]
        serve += ["--model", str(demo_model), "--bundle", str(root / "demo/bundle")]
        log = folder / "server.log"
        process = stack.enter_context(_running(serve, log, root, os.environ | settings))
        server = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        _until(lambda: process.poll() is not None or _answers(server, "/readyz"), 1800, log)
        assert process.poll() is None, log.read_text()[-3000:]
        url = stack.enter_context(_prometheus(root, folder, port))
        prometheus = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        _until(lambda: _answers(prometheus, "/-/ready"), 30, folder / "prometheus.log")
        time.sleep(3)  # a scrape before the load: a counter that is born full has not increased
        _load(root, folder, server)
        time.sleep(5)
        yield Watched(server, prometheus, spans, folder)


def _load(root: Path, folder: Path, server: httpx.Client) -> None:
    """Known and unknown prompts at every alpha, asked with `candor batch`, and feedback on the answers."""
    lines = (root / "demo/bundle/exemplars.jsonl").read_text(encoding="utf-8").splitlines()[:LOAD]
    prompts = [json.loads(line)["prompt"] for line in lines] + list(UNLIKE)
    requests = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "word-ordering",
                "messages": [{"role": "user", "content": prompt}],
                "reliability": {"alpha": (0.9, 0.95)[number % 2]},
            },
        }
        for number, prompt in enumerate(prompts)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests), encoding="utf-8")
    batch = [
        sys.executable,
        "-c",
        "from candor.app.cli import main; main()",
        "batch",
        str(folder / "in.jsonl"),
    ]
    command = [*batch, str(folder / "out.jsonl"), "--url", str(server.base_url), "--concurrency", "8"]
    subprocess.run(command, cwd=root, check=True, timeout=600)
    for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines():
        body = json.loads(line)["response"]["body"]
        server.post("/v1/reliability/feedback", json={"id": body["id"], "index": 0, "correct": True})


def test_every_panel_has_data(watched: Watched, panels: list[dict[str, Any]]) -> None:
    empty = []
    for panel in panels:
        for query in panel["targets"]:
            expression = query["expr"].replace("$model_name", ".+").replace("$__rate_interval", "1h")
            if not watched.query(expression):
                empty.append((panel["title"], expression))
    assert empty == []
    assert len(panels) > 15


def test_the_engines_metrics_bear_the_served_name(watched: Watched) -> None:
    for name in ("vllm:generation_tokens_total", "sdm_answers_total"):
        assert {one["metric"]["model_name"] for one in watched.query(name)} == {"word-ordering"}


def test_every_rule_and_alert_is_evaluated(watched: Watched, rules: list[dict[str, Any]]) -> None:
    groups = watched.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    health = {
        rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]
    }
    assert health == {rule.get("record") or rule["alert"]: ("ok", None) for rule in rules}


def test_counts_are_those_of_what_was_asked(watched: Watched) -> None:
    lines = [json.loads(line) for line in (watched.folder / "out.jsonl").read_text().splitlines()]
    results = [line["response"]["body"]["reliability"]["results"][0] for line in lines]
    for region in ("high", "low", "ood", "unavailable"):
        [one] = watched.query(f'sum(sdm_answers_total{{region="{region}"}})')
        assert int(one["value"][1]) == sum(result["region"] == region for result in results)
    [one] = watched.query('sum(sdm_feedback_total{correct="true"})')
    assert int(one["value"][1]) == len(results) == LOAD + len(UNLIKE)


def test_exemplars_lead_to_traces(watched: Watched) -> None:
    parameters = {"query": "sdm_probability_bucket", "start": time.time() - 600, "end": time.time()}
    answer = watched.prometheus.get("/api/v1/query_exemplars", params=parameters).json()["data"]
    ids = {exemplar["labels"]["trace_id"] for series in answer for exemplar in series["exemplars"]}
    assert ids
    _until(lambda: ids <= watched.spans.keys(), 15, watched.folder / "server.log")
    names = {"POST /v1/chat/completions", "answer", "queue", "generate", "score"}
    assert all(watched.spans[one] == names for one in ids)


@contextmanager
def _receiver() -> Iterator[tuple[str, dict[str, set[str]]]]:
    """An OTLP receiver: its address, and names of the spans that came, by trace id."""
    spans: dict[str, set[str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        spans.setdefault(span.trace_id.hex(), set()).add(span.name)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", spans
        finally:
            http.shutdown()
            thread.join()


@contextmanager
def _prometheus(root: Path, folder: Path, target: int) -> Iterator[str]:
    """compose.yaml's Prometheus, in a hurry: it looks every second."""
    source = root / "docker/prometheus"
    config = yaml.safe_load((source / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    del config["alerting"]
    config["scrape_configs"] = [
        {"job_name": "candor", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name in config["rule_files"]:
        text = (source / name).read_text(encoding="utf-8")
        (folder / name).write_text(
            re.sub(r"^    interval: 1m\n", "", text, flags=re.MULTILINE), encoding="utf-8"
        )
    port = _free_port()
    command = ["prometheus", "--config.file", str(folder / "prometheus.yml"), "--storage.tsdb.path"]
    command += [str(folder / "tsdb"), f"--web.listen-address=127.0.0.1:{port}"]
    command += ["--enable-feature=exemplar-storage"]
    with _running(command, folder / "prometheus.log", folder, dict(os.environ)):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _running(
    command: list[str], log: Path, folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def _until(holds: Callable[[], bool], within_s: float, log: Path) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
