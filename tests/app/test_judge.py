"""Candor's own server as the judge: what it withholds is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.verifiers import load_verifier


def test_a_served_model_judges(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "max_model_len", 4096)
    server.engine.script("four", pieces=("Right", "."))
    path = tmp_path / "judge.toml"
    given = {"url": f"{server.url}/v1", "model": "tiny", "rubric": "Right if it is the same number."}
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    verify = load_verifier(f"judge({path})")
    assert verify("four", "4") is True
    assert verify("five", "4") is None  # it says "The answer."
    asked = [text for text, _, _ in server.engine.asked if "<answer>" in text]
    assert "system:You judge whether" in asked[-2]
    assert "<answer>\nfour\n</answer>" in asked[-2]
