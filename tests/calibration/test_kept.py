"""How an engine is started whose answers nobody reads before they are whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from candor.calibration.kept import whole_answers
from candor.engine.settings import EngineSettings

SETTINGS = EngineSettings(Path("model"), max_model_len=512)


def test_vllm_sends_no_single_tokens() -> None:
    assert whole_answers(SETTINGS).vllm == {"stream_interval": 512}


def test_what_was_given_stays() -> None:
    given = replace(SETTINGS, vllm={"stream_interval": 4, "seed": 1})
    assert whole_answers(given) == given


def test_other_engines_take_none_of_vllms_options() -> None:
    other = replace(SETTINGS, kind="transformers")
    assert whole_answers(other) is other
