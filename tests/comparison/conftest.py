"""The scripted engine and task of the calibration's tests: a comparison judges the same answers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from candor.engine.prompt import ChatFormat


@pytest.fixture(scope="session")
def scripted() -> Any:
    """tests/calibration/conftest.py as a module."""
    path = Path(__file__).parents[1] / "calibration" / "conftest.py"
    spec = spec_from_file_location("scripted_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_engine(scripted: Any) -> Callable[..., Any]:
    engine: Callable[..., Any] = scripted.ScriptedEngine
    return engine


@pytest.fixture
def chat(scripted: Any) -> ChatFormat:
    found: ChatFormat = scripted.scripted_chat()
    return found
