"""Golden prompts: an engine that gives other states than the calibrated ones is not ready."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from candor.app.process.backend import Backend
from candor.app.process.selftest import TOLERANCE, GoldenMismatch, SelfTest
from candor.engine.base import EngineDead
from candor.sdm.estimator import SDMEstimator


def check(backend: Backend) -> SelfTest:
    async def main() -> SelfTest:
        golden = SelfTest(backend)
        await golden.check()
        return golden

    return asyncio.run(main())


def test_the_calibrated_states(backend: Backend) -> None:
    golden = check(backend)
    assert golden.fault is None
    rows = [case.row for case in golden._cases]
    support = backend.bundle.estimator.support
    assert support.predictions[rows].tolist() == [0, 1]  # one of each class, known rightly
    assert support.labels[rows].tolist() == [0, 1]
    # The surest: z' = (-s, s) with s the mean of h' over two.
    s = support.h_prime.mean(dim=1)
    assert rows == [int(s.argmin()), int(s.argmax())]


def shifted(engine: Any, estimator: SDMEstimator, share: float) -> None:
    """Every state off by a share of the distance that golden prompts are measured in."""
    for prompt, h in engine.known.items():
        unit = (estimator.support.h_prime - h).norm(dim=1).median()
        engine.known[prompt] = h + share * unit / 8**0.5  # 8 numbers, equally


@pytest.mark.parametrize(("share", "ready"), [(0.9 * TOLERANCE, True), (1.1 * TOLERANCE, False)])
def test_the_tolerance(
    backend: Backend, engine: Any, estimator: SDMEstimator, share: float, ready: bool
) -> None:
    shifted(engine, estimator, share)
    if ready:
        check(backend)
    else:
        with pytest.raises(GoldenMismatch, match=r"got \d and 0\.275"):
            check(backend)


def test_another_verdict(backend: Backend, engine: Any) -> None:
    for prompt, h in engine.known.items():
        engine.known[prompt] = -h
    with pytest.raises(GoldenMismatch, match="verdict 0"):
        check(backend)


def test_no_number(backend: Backend, engine: Any) -> None:
    for prompt in engine.known:
        engine.known[prompt] = torch.full((8,), float("nan"))
    with pytest.raises(GoldenMismatch, match="finite: False"):
        check(backend)


def test_a_dead_engine_is_no_mismatch(backend: Backend, engine: Any) -> None:
    engine.script("prompt", fails=EngineDead("gone"))
    with pytest.raises(EngineDead):
        check(backend)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_conversations_of_several_turns(backend: Backend, caplog: Any, version: int) -> None:
    """Older bundles keep them as a text to show, from which the prompt cannot surely be made again."""
    bundle = backend.bundle
    exemplars = tuple(
        replace(one, messages=({"role": "system", "content": "Be long."}, *one.messages))
        for one in bundle.exemplars
    )
    bundle = replace(bundle, exemplars=exemplars, manifest=replace(bundle.manifest, format_version=version))
    golden = check(replace(backend, bundle=bundle))
    assert bool(golden._cases) is (version == 4)
    assert ("no golden prompt" in caplog.text) is (version < 4)


def test_asked_deeply(serve: Any, engine: Any) -> None:
    with serve() as server:
        assert server.client.get("/readyz?deep=true").json() == {"status": "ok"}
        assert [text for text, _, _ in engine.asked if "prompt " in text]  # it was answered, not looked up
        known = dict(engine.known)
        engine.known.update({prompt: -h for prompt, h in known.items()})
        assert server.client.get("/readyz").status_code == 200
        refused = server.client.get("/readyz?deep=true")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "golden_mismatch"
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        assert not server.ended.is_set()
        engine.known.update(known)
        assert server.client.get("/readyz?deep=true").status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_asked_deeply_of_an_engine_that_does_not_answer(serve: Any, engine: Any) -> None:
    engine.script("prompt", pieces=(), hangs=True)
    with serve(request_timeout_s=0.2) as server:
        refused = server.client.get("/readyz?deep=true")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline_exceeded")
