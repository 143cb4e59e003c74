"""What several test folders share: the models, and the mark `model` on every test that needs one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _model(name: str) -> Path:
    model = ROOT / "var/models" / name
    if not model.is_dir():
        pytest.fail(f"{model} is missing; `make test` prepares it")
    return model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of the model that `make serve` serves."""
    return _model("smollm2-135m-word-ordering")


@pytest.fixture(scope="session")
def base_model() -> Path:
    """Directory of the model that the demo's was made from."""
    return _model("smollm2-135m-instruct")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"demo_model", "base_model"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)
