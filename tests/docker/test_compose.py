"""The CPU image, built from its Dockerfile and run with compose.yaml's other services: it answers and is watched.

    pytest -m slow tests/docker/test_compose.py

Builds for minutes, then vLLM compiles for minutes. BUILT=1 takes the image candor:demo as it is. What is set here of
CANDOR_*, VLLM_* and OMP_* holds in the container too: CANDOR_EAGER=true starts it sooner. Images are pulled where
they are not at hand; without Grafana's the others are tested, without another nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytestmark = pytest.mark.slow

PROJECT = "candor-test"
CONTAINER = f"{PROJECT}_candor_1"
PROMPT = (
    "Finish the sentence with the words in the right order.\n"
    "Sentence: The children ran home before the\nWords: began. storm"
)


@pytest.fixture(scope="module")
def services(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """Names of the services that run."""
    for tool, source in {
        "podman": "`apt-get install podman netavark aardvark-dns iptables catatonit`",
        "podman-compose": "`pip install podman-compose`",
    }.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: {source}")
    described = yaml.safe_load((root / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    del described["candor-gpu"]
    if not _has(described["grafana"]["image"]):
        del described["grafana"]
    [base] = re.findall("^ARG PYTHON=(.+)$", (root / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    for image in (base, *(one["image"] for one in described.values() if "build" not in one)):
        if not _has(image):
            pytest.skip(f"{image} is neither here nor to be pulled")
    for port in (int(one.split(":")[1]) for service in described.values() for one in service["ports"]):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is taken")

    settings = {
        name: value for name, value in os.environ.items() if name.startswith(("CANDOR_", "VLLM_", "OMP_"))
    }
    override = tmp_path_factory.mktemp("compose") / "override.yaml"
    override.write_text(yaml.safe_dump({"services": {"candor": {"environment": settings}}}), encoding="utf-8")
    compose = ["podman-compose", "-p", PROJECT, "-f", "docker/compose.yaml", "-f", str(override)]
    wheels = os.environ.get("PIP_FIND_LINKS")
    arguments = f"--volume {wheels}:{wheels}:ro --build-arg PIP_FIND_LINKS={wheels}" if wheels else ""
    try:
        if "BUILT" not in os.environ:
            # Other formats than Docker's forget the health check.
            formatted = os.environ | {"BUILDAH_FORMAT": "docker"}
            build = [*compose, f"--podman-build-args={arguments}", "build", "candor"]
            subprocess.run(build, cwd=root, env=formatted, check=True)
        subprocess.run([*compose, "up", "--detach", "--no-build", *described], cwd=root, check=True)
        _until(_healthy, 1200)
        yield set(described)
    finally:
        subprocess.run([*compose, "down", "--volumes"], cwd=root, check=False)


def test_the_server_is_nobody_on_a_read_only_system(services: set[str]) -> None:
    assert _inside("id", "-u") == "10001"
    mounts = {
        line.split()[1]: line.split()[3].split(",") for line in _inside("cat", "/proc/mounts").splitlines()
    }
    assert "ro" in mounts["/"]
    assert "rw" in mounts["/cache"]
    status = _inside("cat", "/proc/1/status")
    assert re.search(r"^CapEff:\s+0+$", status, flags=re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, flags=re.MULTILINE)


def test_it_answers_reliably(services: set[str]) -> None:
    body = {"model": "word-ordering", "messages": [{"role": "user", "content": PROMPT}]}
    answer = httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body, timeout=120).json()
    assert answer["reliability"]["results"][0]["region"] == "high", answer
    assert "before the storm began." in answer["choices"][0]["message"]["content"]


def test_prometheus_watches_it(services: set[str]) -> None:
    _until(lambda: _number('sum(sdm_answers_total{region="high"})') >= 1, 60)
    assert _number('sum(vllm:generation_tokens_total{model_name="word-ordering"})') > 0
    targets = _prometheus("targets")["activeTargets"]
    assert {(one["labels"]["job"], one["health"]) for one in targets} == {
        ("candor", "up"),
        ("prometheus", "up"),
    }
    _until(lambda: {rule["health"] for rule in _rules()} == {"ok"}, 120)
    assert len(_rules()) > 20
    # Down while it started; the alert goes out at a later look.
    _until(lambda: {one["state"] for one in _rules() if one["name"] == "CandorDown"} == {"inactive"}, 120)


def test_prometheus_tells_alertmanager(services: set[str]) -> None:
    assert [one["url"] for one in _prometheus("alertmanagers")["activeAlertmanagers"]] == [
        "http://alertmanager:9093/api/v2/alerts"
    ]
    assert httpx.get("http://127.0.0.1:9093/-/ready").status_code == 200


def test_grafana_shows_the_dashboard(services: set[str]) -> None:
    if "grafana" not in services:
        pytest.skip("Grafana's image is neither here nor to be pulled")
    found = httpx.get("http://127.0.0.1:3000/api/dashboards/uid/candor").json()
    assert found["meta"]["provisioned"]


def _has(image: str) -> bool:
    return _podman("image", "exists", image).returncode == 0 or _podman("pull", "-q", image).returncode == 0


def _healthy() -> bool:
    """Asked for by hand: without systemd, podman never asks."""
    assert _podman("inspect", "-f", "{{.State.Status}}", CONTAINER).stdout.strip() == "running", _podman(
        "logs", "--tail", "50", CONTAINER
    )
    return _podman("healthcheck", "run", CONTAINER).returncode == 0


def _inside(*command: str) -> str:
    done = _podman("exec", CONTAINER, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _podman(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=600, check=False)


def _prometheus(path: str, **parameters: str) -> Any:
    answer = httpx.get(f"http://127.0.0.1:9090/api/v1/{path}", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def _rules() -> list[dict[str, Any]]:
    return [rule for group in _prometheus("rules")["groups"] for rule in group["rules"]]


def _number(expression: str) -> float:
    found = _prometheus("query", query=expression)["result"]
    return float(found[0]["value"][1]) if found else 0.0


def _until(holds: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(2)
