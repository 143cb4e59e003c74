"""A small sound bundle, and ways to write its files by hand, sealed so that only the wanted fault shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from candor.engine.base import ModelIdentity, Representation
from candor.model_store.bundle import Exemplar, encode
from candor.model_store.manifest import (
    LISTED,
    MANIFEST,
    SEAL,
    AdapterIdentity,
    FileEntry,
    Manifest,
    seal,
)
from candor.policy.certificate import Certificate
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.policy import Policy
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator

Files = dict[str, bytes]


def _estimator(seed: int = 0, alphas: tuple[float, ...] = (0.9, 0.95)) -> SDMEstimator:
    """Two separable classes, h of 2 * 4 + 3 numbers, h' of 5; 40 support and 40 calibration rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(80) % 2
    h = torch.randn(80, 11, generator=generator) + 6 * labels.unsqueeze(1)
    adaptor = ExemplarAdaptor(torch.full((11,), 3.0), torch.ones(11), 5, 2, generator)
    with torch.no_grad():  # a head that points from class 0 to class 1
        direction = adaptor(torch.ones(1, 11))[0] - adaptor(-torch.ones(1, 11))[0]
        adaptor.head.weight.copy_(torch.cat([-direction, direction]))
        middle = adaptor.head.weight @ adaptor(torch.zeros(1, 11))[0][0]
        adaptor.head.bias.copy_(-middle)
    return SDMEstimator.fit(adaptor, (h[:40], labels[:40]), (h[40:], labels[40:]), alphas)


def _asked(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


@pytest.fixture(scope="session")
def make_estimator() -> Callable[..., SDMEstimator]:
    return _estimator


@pytest.fixture(scope="session")
def estimator() -> SDMEstimator:
    return _estimator()


@pytest.fixture(scope="session")
def exemplars(estimator: SDMEstimator) -> tuple[Exemplar, ...]:
    pairs = zip(estimator.support.labels.tolist(), estimator.support.predictions.tolist(), strict=True)
    return tuple(
        Exemplar(f"row-{i}", label, prediction, _asked(f"order: c b a {i}"), f"a b c {i}\n\u2028«é»")
        for i, (label, prediction) in enumerate(pairs)
    )


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return Manifest(
        name="demo",
        created="2026-01-31T12:00:00Z",
        model=ModelIdentity("tiny", "TinyForCausalLM", 4, "float32", "d" * 64, "a" * 64, "b" * 64, "c" * 64),
        adapter=AdapterIdentity("order", "d" * 64),
        representation=Representation(
            order=("mean", "last", "evidence"), evidence=("log_mean_surprisal", "min_margin", "log_length")
        ),
        policy=Policy(max_tokens=64, conversations=Conversations(SystemPrompt.fixed("Order the words."))),
        alphas=(0.9, 0.95),
        class_names=("wrong", "right"),
        certificates=(Certificate(0.9, "lower", 0.95, 0.95, 250.0, 400, 120, 119, 0.961),),
        provenance={"data_sha256": "e" * 64, "counts": {"train": 40}, "seeds": [0, 1], "rate": 0.1},
    )


@pytest.fixture(scope="session")
def files(manifest: Manifest, estimator: SDMEstimator, exemplars: tuple[Exemplar, ...]) -> Files:
    """Every file of a sound bundle."""
    return encode(manifest, estimator, exemplars, {"accuracy": 0.975, "none_at": [0.99]})


def _write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def write() -> Callable[[Path, Files], Path]:
    return _write


@pytest.fixture(scope="session")
def vouch(manifest: Manifest) -> Callable[..., Files]:
    """Files given anew, with a manifest whose digests fit them; also with a changed manifest."""

    def vouch(files: Files, **changed: object) -> Files:
        entries = {name: FileEntry.of(files[name]) for name in LISTED}
        data = replace(manifest, files=entries, **changed).to_bytes()  # type: ignore[arg-type]
        return {**files, MANIFEST: data, SEAL: seal(data)}

    return vouch
