"""A verifier held to people's labels: counted by hand, and the claim held to worlds whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from candor.calibration.agreement import Agreement, agreement
from candor.calibration.certificate import Claim
from candor.calibration.data import load_records
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.intervals import binomial_cdf, binomial_tails
from candor.calibration.verifiers import load_verifier

VERIFIER = """
def f(response, reference):
    return "unknown" if response == "?" else response.startswith("good")
"""
ROWS = [("good", 1), ("good 2", 1), ("good 3", 0), ("bad", 0), ("bad 2", 1), ("?", 1), ("good 4", 1)]


def test_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(VERIFIER)
    rows = [{"prompt": f"q{i}", "response": said, "label": label} for i, (said, label) in enumerate(ROWS)]
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = agreement(load_records(path), f"{tmp_path}/mine.py:f", tmp_path / "cache")
    assert found == Agreement(f"{tmp_path}/mine.py:f", 4, 1, 2, 1, 1)
    (tmp_path / "mine.py").write_text(
        VERIFIER + "raise RuntimeError\n"
    )  # kept: not loaded anew, not asked again
    assert agreement(load_records(path), f"{tmp_path}/mine.py:f", tmp_path / "cache") == found
    load_verifier.cache_clear()
    path.write_text(json.dumps({"prompt": "q", "reference": "a", "verifier": "exact"}))
    with pytest.raises(DataError, match="has no response with a label by people"):
        agreement(load_records(path), "exact", tmp_path / "cache")


def test_the_bound_is_exact() -> None:
    found = Agreement("judge", 200, 4, 0, 0, 0)
    e = found.error_bound(0.05)
    assert binomial_cdf(4, 200, e) == pytest.approx(0.05, abs=1e-9)
    assert Agreement("judge", 0, 0, 5, 0, 0).error_bound(0.05) == 1


def test_the_claim_is_raised_by_it_or_cannot_be_made() -> None:
    wanted = Claim(0.9, 0.05)
    found = Agreement("judge", 400, 2, 0, 0, 0)
    raised = found.by_verifier(wanted)
    assert raised.delta == 0.025
    assert raised.accuracy * (1 - found.error_bound(0.025)) == pytest.approx(0.9)
    with pytest.raises(
        CalibrationError, match=r"20 wrong .*no certificate of 0.9 by people's labels can be shown"
    ):
        Agreement("judge", 200, 20, 0, 0, 0).by_verifier(wanted)


@pytest.mark.parametrize(("error", "accuracy"), [(0.03, 0.93), (0.01, 0.92), (0.06, 0.97)])
def test_a_false_certificate_by_people_is_as_rare_as_promised(error: float, accuracy: float) -> None:
    """Both counts drawn 2,000 times; where the accuracy by people is under the one wanted, certificates are false."""
    wanted, humans, answered = Claim(0.9, 0.1), 300, 400
    by_people = accuracy * (1 - error)
    generator = torch.Generator().manual_seed(1)
    false = issued = 0
    for _ in range(2000):
        wrong = int((torch.rand(humans, generator=generator) < error).sum())
        right = int((torch.rand(answered, generator=generator) < accuracy).sum())
        try:
            claim = Agreement("judge", humans, wrong, 0, 0, 0).by_verifier(wanted)
        except CalibrationError:
            continue
        passed = float(binomial_tails(answered, claim.accuracy)[right]) <= claim.delta
        issued += passed
        false += passed and by_people < wanted.accuracy
    assert false <= 0.1 * 2000
    if by_people >= wanted.accuracy + 0.03:
        assert issued > 0
