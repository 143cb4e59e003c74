"""A request's `model` picks the adapter and the bundle that was made with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from candor.app.process.backend import Backend
from candor.engine.base import AdapterIdentity, IdentityMismatch, ModelIdentity
from candor.model_store.bundle import Bundle
from candor.model_store.identity import check_identity
from candor.policy.conversation import Conversations, SystemPrompt

LEGAL = AdapterIdentity("legal", "e" * 64)


@pytest.fixture
def legal(bundle: Bundle) -> Bundle:
    """Of the same estimator, with another policy."""
    exact = Conversations(SystemPrompt.fixed("Be exact."))
    policy = replace(bundle.manifest.policy, max_tokens=7, conversations=exact)
    manifest = replace(bundle.manifest, name="legal", adapter=LEGAL, policy=policy)
    return replace(bundle, manifest=manifest, digest="fedcba9876543210" * 4)


@pytest.fixture
def adapted(backend: Backend, legal: Bundle) -> Backend:
    return Backend(replace(backend.engine, adapter=LEGAL, asked=[]), backend.chat, legal)


@pytest.fixture
def both(serve: Any, adapted: Backend) -> Iterator[Any]:
    with serve(adapted=[adapted]) as server:
        yield server


def test_each_name_has_its_engine_policy_and_bundle(both: Any, adapted: Backend, bundle: Bundle) -> None:
    under: Any = adapted.engine
    response = both.chat("a question", model="legal")
    assert response.json()["model"] == "legal"
    assert response.headers["x-sdm-bundle"] == adapted.bundle.digest
    assert response.json()["system_fingerprint"] == f"sdm-{adapted.bundle.digest[:12]}"
    [(text, sampling, _)] = under.asked
    assert "Be exact." in text
    assert sampling.max_tokens == 7
    assert both.engine.asked == []
    other = both.chat("a question")
    assert other.headers["x-sdm-bundle"] == bundle.digest
    assert "Be brief." in both.engine.asked[0][0]


def test_given_pairs_and_bundles_go_by_name_too(both: Any, adapted: Backend) -> None:
    pair = {"messages": [{"role": "user", "content": "q"}], "response": "a", "model": "legal"}
    assert both.client.post("/v1/reliability", json=pair).json()["model"] == "legal"
    assert adapted.engine.summarised == 1
    shown = both.client.get("/v1/reliability", params={"model": "legal"}).json()
    assert shown["bundle"] == adapted.bundle.digest
    assert both.client.get("/v1/reliability").json()["name"] == "tiny"
    names = [model["id"] for model in both.client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "legal"]


def test_another_name_is_not_found(both: Any) -> None:
    for response in (
        both.chat("q", model="medical"),
        both.client.get("/v1/models/medical"),
        both.client.get("/v1/reliability", params={"model": "medical"}),
    ):
        assert response.status_code == 404
        assert "'tiny', 'legal'" in response.json()["error"]["message"]


def test_metrics_tell_them_apart(both: Any) -> None:
    both.chat("q", model="legal")
    lines = both.client.get("/metrics").text.splitlines()
    counted = {
        name: [
            line for line in lines if line.startswith("sdm_answers_total") and f'model_name="{name}"' in line
        ]
        for name in ("tiny", "legal")
    }
    total = {name: sum(float(line.rsplit(" ", 1)[1]) for line in found) for name, found in counted.items()}
    assert total == {"tiny": 0.0, "legal": 1.0}


def test_a_bundle_of_another_adapter_is_refused(
    backend: Backend, legal: Bundle, identity: ModelIdentity
) -> None:
    under: Callable[[AdapterIdentity | None], Any] = lambda one: replace(backend.engine, adapter=one)  # noqa: E731
    check_identity(under(LEGAL), legal)
    check_identity(under(AdapterIdentity("other name", LEGAL.sha256)), legal)
    for engine, made in (
        (under(None), legal),
        (under(AdapterIdentity("legal", "f" * 64)), legal),
        (under(LEGAL), backend.bundle),
    ):
        with pytest.raises(IdentityMismatch, match="adapter: the bundle was made for"):
            check_identity(engine, made)
