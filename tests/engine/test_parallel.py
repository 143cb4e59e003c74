"""One model in two processes, in each way that vLLM divides it, and with speculation: h is what one process gives.

Minutes, with two cores: by hand, `pytest tests/engine/test_parallel.py -m slow`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from benchmarks.zoo.contract import CHUNK, REPRESENTATION, Contract
from benchmarks.zoo.families import build
from candor.engine.base import Engine, Generation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings

pytestmark = [pytest.mark.model, pytest.mark.slow]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
Tokens = tuple[int, ...]
WAYS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "data": {"data_parallel_size": 2},
    "n-grams": {"speculative_config": NGRAM},
    "n-grams, tensor": {"speculative_config": NGRAM, "tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    pytest.importorskip("vllm")
    model = build("Phi-3.5 (longrope)", tmp_path_factory.mktemp("models") / "model")
    return EngineSettings(
        model,
        "transformers",
        REPRESENTATION,
        "float32",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=CHUNK,
        kv_cache_bytes=1 << 27,
        eager=True,
    )


@pytest.fixture(scope="module")
def reference(settings: EngineSettings, runner: asyncio.Runner) -> Engine:
    return runner.run(start_engine(settings))


@pytest.mark.parametrize("way", WAYS)
def test_the_states_are_exact(
    way: str,
    settings: EngineSettings,
    reference: Engine,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")  # so that what the engine sets is undone
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    engine = runner.run(start_engine(replace(settings, kind="vllm", vllm=WAYS[way])))
    drafted, accepted = (counted(f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
    try:
        chat = ChatFormat.from_directory(settings.model)
        found = runner.run(Contract(engine, reference, chat).hold())
        alone, beside = runner.run(greedy_answers(engine, chat))
    finally:
        runner.run(engine.close())
    assert len(found) == 12
    assert not [one for one in found if "none found" in one.where]
    assert max(found, key=lambda one: one.error).error <= 1e-4, found
    assert alone == beside
    if "speculative_config" in WAYS[way]:
        drafted = counted("spec_decode_num_draft_tokens") - drafted
        assert 0 < counted("spec_decode_num_accepted_tokens") - accepted < drafted


async def greedy_answers(engine: Engine, chat: ChatFormat) -> tuple[list[Tokens], list[Tokens]]:
    """Answers at temperature 0, each alone and amid sampled ones."""

    async def answer(number: int, temperature: float) -> Tokens:
        text = f"Tell me of {number} boats and the wind. " * 3
        prompt = chat.encode_chat([{"role": "user", "content": text}])
        *_, found = [item async for item in engine.generate(prompt, Sampling(20, temperature, seed=number))]
        assert isinstance(found, Generation)
        return found.token_ids

    alone = [await answer(number, 0.0) for number in range(0, 12, 3)]
    beside = await asyncio.gather(*(answer(number, 0.9 if number % 3 else 0.0) for number in range(12)))
    return alone, beside[::3]


def counted(name: str) -> float:
    """What vLLM's engines of this process have counted under `name`, over all labels."""
    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == f"vllm:{name}_total")
