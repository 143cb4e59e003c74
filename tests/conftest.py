"""What several test folders share: the demo model, and one event loop per engine."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of the model that `make serve` serves."""
    model = ROOT / "var/models/smollm2-135m-word-ordering"
    if not model.is_dir():
        pytest.fail(f"{model} is missing; `make setup` prepares it")
    return model
