"""`candor recalibrate` on a store: from rows to a bundle that shadows, is promoted, and says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.store.database import Database
from candor.app.store.records import Content, Draw, GivenVerdict, Label
from candor.engine.base import HiddenSummary, PromptStates
from candor.model_store.bundle import Bundle, load_bundle
from candor.model_store.store import publish
from candor.policy.decision import Verdict
from candor.policy.judging import TwoGates

HIDDEN = 4
MADE = 1767225600.0  # 2026-01-01, when the bundle was made
Rows = Callable[..., str]


@pytest.fixture
def old(bundle: Bundle, gates: TwoGates, tmp_path: Path) -> Bundle:
    manifest = replace(bundle.manifest, rule=gates.terms)
    publish(tmp_path / "old", manifest, bundle.estimator, bundle.exemplars, bundle.report, gates.rule)
    return load_bundle(tmp_path / "old")


@pytest.fixture
def fill(old: Bundle, tmp_path: Path) -> Rows:
    """Puts `n` answers into the store, drawn with `share` and labelled by what is true; returns the store."""

    def filled(
        n: int,
        *,
        share: float = 0.1,
        start: int = 1000,
        digest: str = old.digest,
        time: float = MADE + 10,
        states: bool = True,
        width: int = HIDDEN,
        label: bool = True,
        calibrated: bool = True,
        drawn: bool = True,
        texts: bool = True,
    ) -> str:
        draw = torch.Generator().manual_seed(start)
        entries: list[Any] = []
        for i in range(start, start + n):
            right = bool(torch.rand((), generator=draw) < 0.7)
            h = torch.randn(2 * width, generator=draw) + (2.0 if right else -2.0)
            prompt = torch.randn(2 * width, generator=draw)
            content = Content(
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"prompt {i}"}],
                f"response {i}",
                HiddenSummary(h[:width], h[width:], torch.empty(0), 10, complete=True),
                PromptStates(prompt[:width], prompt[width:], complete=True),
                old.manifest.representation,
            )
            verdict = Verdict("high", False, None, 0.9, calibrated)
            given = GivenVerdict(f"chatcmpl-{i}", 0, verdict, digest, "tiny", "two-gates", time=time + i)
            row = given.row(Draw(share, share, drawn))
            row |= content.states() if states else {}
            if texts:
                row |= {"conversation": json.dumps(content.conversation), "answer": content.answer}
            entries.append(("verdicts", row))
            if label:
                entries.append(("labels", Label(f"chatcmpl-{i}", 0, right, "eva").row()))
        store = str(tmp_path / "store.db")
        database = Database.open(store)
        database.write(entries)
        database.close()
        return store

    return filled


def recalibrate(store: str, tmp_path: Path, *more: Any, out: str = "new", bundle: str = "old") -> Any:
    words = ["recalibrate", "--from", store, "--bundle", tmp_path / bundle, "--out", tmp_path / out, *more]
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_from_labels_to_a_promoted_bundle(
    old: Bundle, fill: Rows, serve_from: Any, engine: Any, tmp_path: Path, wait_until: Any
) -> None:
    store = fill(500)
    fill(30, start=3000, drawn=False)  # looked up by somebody: exemplars, and no sample of anything
    done = recalibrate(store, tmp_path)
    assert done.exit_code == 0, done.stderr
    new = load_bundle(tmp_path / "new")
    assert new.digest in done.stdout
    shown = CliRunner().invoke(cli, ["bundle", "show", str(tmp_path / "new")]).stdout
    assert f"{old.digest[:12]}, by 500 audits" in shown
    lineage = new.manifest.provenance["lineage"]
    assert (lineage["parent"], lineage["audits"], lineage["other_labels"]) == (old.digest, 500, 30)
    assert new.manifest.rule is not None
    certificate = new.manifest.rule.at(0.9)
    assert certificate is not None
    assert certificate.records == lineage["certifying"]
    certifying = {one.id for one in new.exemplars if one.id.startswith("chatcmpl-")}
    assert len(certifying) == lineage["teaching"] + 30
    assert new.exemplars[-1].messages == ({"role": "user", "content": "prompt 3029"},)
    for exemplar, h in zip(new.exemplars, new.estimator.support.h_prime, strict=True):
        engine.known[exemplar.prompt] = h  # h' = h in this estimator
    with serve_from(tmp_path / "old", shadow=tmp_path / "new") as server:
        server.chat("hello")
        wait_until(
            lambda: (
                sum(
                    sum(row.values())
                    for row in server.client.get("/bundles").json()["data"][0]["shadow"]["decisions"].values()
                )
                == 1
            )
        )
        assert server.client.post("/bundles/promote", json={}).json()["bundle"] == new.digest
        assert server.chat("hello").headers["x-sdm-bundle"] == new.digest
        report = server.client.get("/v1/reliability").json()["report"]
        assert report["recalibration"]["parent"] == old.digest
    again = recalibrate(store, tmp_path)
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_what_was_used_before_certifies_no_more(old: Bundle, fill: Rows, tmp_path: Path) -> None:
    """Of the next bundle's own answers all are fresh; those that its parent judged are not, and only teach."""
    store = fill(500)
    assert recalibrate(store, tmp_path).exit_code == 0
    new = load_bundle(tmp_path / "new")
    later = new.manifest.created
    from datetime import datetime

    fill(450, start=5000, digest=new.digest, time=datetime.fromisoformat(later).timestamp() + 60)
    done = recalibrate(store, tmp_path, "--also", tmp_path / "old", bundle="new", out="third")
    assert done.exit_code == 0, done.stderr
    lineage = load_bundle(tmp_path / "third").manifest.provenance["lineage"]
    assert lineage["parent"] == new.digest
    assert lineage["audits"] == 450
    # What taught already is in the support by its name; what certified or measured then may teach now.
    before = new.manifest.provenance["lineage"]
    assert lineage["other_labels"] == before["certifying"] + before["measuring"]


def test_refusals(old: Bundle, bundle: Bundle, gates: TwoGates, fill: Rows, tmp_path: Path) -> None:
    def refused(store: str, *more: Any, bundle: str = "old") -> str:
        done = recalibrate(store, tmp_path, *more, bundle=bundle)
        assert done.exit_code == 1
        assert not (tmp_path / "new").exists()
        assert isinstance(done.exception, SystemExit)
        return str(done.stderr)

    store = fill(5, label=False)
    assert "no labelled answer" in refused(store)
    fill(5, start=50, states=False)
    assert "CANDOR_KEEP_STATES=drawn" in refused(store)
    fill(40, start=100)
    assert "too few labels" in refused(store)
    fill(40, start=200, digest="f" * 64)
    other = tmp_path / "store.db"
    manifest = replace(bundle.manifest, rule=gates.terms)
    for name, changes in {
        "model": {"model": replace(manifest.model, weights_sha256="e" * 64)},
        "policy": {"policy": replace(manifest.policy, max_tokens=8)},
        "resampling": {"policy": replace(manifest.policy, temperature=0.7, resample=3)},
    }.items():
        made = replace(manifest, **changes)
        publish(tmp_path / name, made, bundle.estimator, bundle.exemplars, bundle.report, gates.rule)
    assert "another model" in refused(str(other), "--also", tmp_path / "model")
    assert "another policy" in refused(str(other), "--also", tmp_path / "policy")
    assert "resamples" in refused(str(other), bundle="resampling")
    assert "40 of ffffffffffff" in refused(str(other), bundle="policy")
    assert "of 0 labelled answers" in refused(str(other), "--since", "2030-01-01")
    fill(3, start=300, width=HIDDEN + 1)
    assert "numbers wide" in refused(str(other))
    assert "cannot keep" in refused(str(tmp_path / "nowhere" / "store.db"))


def test_what_is_not_a_sample_certifies_nothing(old: Bundle, fill: Rows, tmp_path: Path) -> None:
    store = fill(600, drawn=False)
    done = recalibrate(store, tmp_path)
    assert done.exit_code == 1
    assert "there is no audit to certify on" in done.stderr
    fill(600, start=4000, calibrated=False)
    assert "there is no audit to certify on" in recalibrate(store, tmp_path).stderr


def test_a_window(old: Bundle, fill: Rows, tmp_path: Path) -> None:
    store = fill(500)
    fill(200, start=2000, time=MADE + 90 * 86_400)
    done = recalibrate(store, tmp_path, "--until", "2026-02-01")
    assert done.exit_code == 0, done.stderr
    assert load_bundle(tmp_path / "new").manifest.provenance["lineage"]["audits"] == 500
    fill(100, start=2500, time=MADE + 95 * 86_400, label=False)  # not labelled yet: beyond the last label
    assert recalibrate(store, tmp_path, out="all").exit_code == 0
    lineage = load_bundle(tmp_path / "all").manifest.provenance["lineage"]
    assert (lineage["audits"], lineage["unlabelled"]) == (700, 0)
