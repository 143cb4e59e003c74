"""A minute of the soak (benchmarks/soak.py): mixed load with aborts, and everything comes back. By hand, an hour."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.servers import serving
from benchmarks.soak import Soak, summary
from demo.task import made

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]


def test_a_minute(demo_model: Path) -> None:
    """No request fails that must not, places and files come back, usual verdicts stay."""
    lines = made("test").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    with serving(demo_model, ROOT / "demo/bundle", {"CANDOR_EAGER": "true"}) as server:
        soak = Soak(server, prompts, seconds=60, workers=12, seed=0)
        asyncio.run(soak.run())
    figures, faults = summary(soak.record, 60)
    print(f"\n{json.dumps(figures, indent=2)}")
    assert faults == []
    assert figures["answers_per_s_last_third"] > 0
    assert figures["fixed_prompts_asked"] > 0
