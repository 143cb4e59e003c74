"""What most first models bring, on one tiny one: windows that cut on every layer, longrope, a tokenizer that puts
spaces before texts and control tokens that take white space, two tokens that end an answer. Phi-3.5 has all of it.

The zoo (`python -m benchmarks.zoo`) holds many more families to the same contract.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.zoo.contract import CHUNK, REPRESENTATION, SEA, Contract
from benchmarks.zoo.families import build
from benchmarks.zoo.tiny import save, sentencepiece, small, tokenizer
from candor.engine.base import Engine, EngineError, Generation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings

pytestmark = pytest.mark.model

WINDOW, SWITCH = 48, 128
QUESTION = [{"role": "user", "content": SEA}]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, runner: asyncio.Runner) -> EngineSettings:
    """Of the model, whose second end token is one that it writes."""
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    tokenizer = sentencepiece(strips=True)
    config = Phi3Config(
        **small(vocab_size=len(tokenizer), sliding_window=WINDOW),
        original_max_position_embeddings=SWITCH,
        rope_parameters={**rope, "original_max_position_embeddings": SWITCH},
    )
    model = tmp_path_factory.mktemp("models") / "like-phi-3.5"
    save(model, config, "Phi3ForCausalLM", tokenizer)
    settings = EngineSettings(
        model,
        "transformers",
        REPRESENTATION,
        "float32",
        max_model_len=512,
        max_num_batched_tokens=CHUNK,
        kv_cache_bytes=1 << 26,
        eager=True,
    )
    written = runner.run(answer(runner.run(start_engine(settings)), settings, Sampling(max_tokens=60)))
    ids = written.token_ids
    end = [token for i, token in enumerate(ids) if token not in ids[:i]][-1]
    file = model / "generation_config.json"
    ends = {"eos_token_id": [2, end]}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | ends), encoding="utf-8")
    return settings


@pytest.fixture(scope="module")
def reference(settings: EngineSettings, runner: asyncio.Runner) -> Engine:
    return runner.run(start_engine(settings))


@pytest.fixture(scope="module")
def served(settings: EngineSettings, runner: asyncio.Runner) -> Iterator[Engine]:
    pytest.importorskip("vllm")
    engine = runner.run(start_engine(replace(settings, kind="vllm")))
    yield engine
    runner.run(engine.close())


async def answer(engine: Engine, settings: EngineSettings, sampling: Sampling) -> Generation:
    prompt = ChatFormat.from_directory(settings.model).encode_chat(QUESTION)
    *_, last = [item async for item in engine.generate(prompt, sampling)]
    assert isinstance(last, Generation)
    return last


def test_its_states_are_exact(
    served: Engine, reference: Any, settings: EngineSettings, runner: asyncio.Runner
) -> None:
    contract = Contract(served, reference, ChatFormat.from_directory(settings.model))
    found = runner.run(contract.hold())
    assert len(found) == 12
    assert not [one for one in found if "none found" in one.where]
    assert max(found, key=lambda one: one.error).error <= 1e-4, found


def test_its_states_are_those_that_vllm_computed_its_logits_of(
    served: Engine, reference: Engine, settings: EngineSettings, runner: asyncio.Runner
) -> None:
    contract = Contract(served, reference, ChatFormat.from_directory(settings.model))
    found = runner.run(contract.hold_to_itself())
    assert len(found) == 4
    assert max(found, key=lambda one: one.error).error <= 1e-4, found


def test_an_answer_ends_at_either_of_its_ends(
    served: Engine, reference: Engine, settings: EngineSettings, runner: asyncio.Runner
) -> None:
    answers = [
        runner.run(answer(engine, settings, Sampling(max_tokens=80))) for engine in (served, reference)
    ]
    for one in answers:
        assert one.finish_reason == "stop"
        assert not one.truncated
        assert len(one.token_ids) < one.completion_tokens < 80
    assert answers[0].token_ids == answers[1].token_ids
    # Bytes that are no letters: vLLM leaves some out where transformers shows a mark for each.
    assert answers[0].text.replace("\ufffd", "") == answers[1].text.replace("\ufffd", "")


def test_a_stop_string_is_no_end(served: Engine, settings: EngineSettings, runner: asyncio.Runner) -> None:
    whole = runner.run(answer(served, settings, Sampling(max_tokens=80)))
    cut = runner.run(answer(served, settings, Sampling(max_tokens=80, stop=(whole.text.strip()[3:5],))))
    assert cut.finish_reason == "stop"
    assert cut.truncated


@pytest.mark.slow
def test_what_was_compiled_is_loaded_at_the_next_start(
    reference: Any,
    settings: EngineSettings,
    runner: asyncio.Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    written = []
    for _ in range(2):
        engine = runner.run(start_engine(replace(settings, kind="vllm", eager=False)))
        try:
            found = runner.run(Contract(engine, reference, ChatFormat.from_directory(settings.model)).hold())
        finally:
            runner.run(engine.close())
        assert max(found, key=lambda one: one.error).error <= 1e-4, found
        written.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("rank_*/model")})
    assert written[0]
    assert written[0] == written[1]  # compiled anew, it would have been written anew


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
@pytest.mark.parametrize("family", ["Gemma 3 (vision checkpoint)", "Qwen 3.5 (text)"])
def test_what_reads_images_too_is_refused_without_torchvision(
    family: str, tmp_path: Path, runner: asyncio.Runner
) -> None:
    pytest.importorskip("vllm")
    model = build(family, tmp_path / "model")
    with pytest.raises(EngineError, match="needs torchvision"):
        runner.run(start_engine(EngineSettings(model, representation=REPRESENTATION, dtype="float32")))


def refused(runner: asyncio.Runner, model: Path, why: str) -> None:
    settings = EngineSettings(model, representation=REPRESENTATION, dtype="float32", max_model_len=512)
    with pytest.raises(EngineError, match=why):
        runner.run(start_engine(settings))


def test_a_model_without_attention_is_refused_before_a_process_starts(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    pytest.importorskip("vllm")
    model = build("Mamba", tmp_path / "model")
    refused(runner, model, "MambaForCausalLM has no attention layer")


def test_a_model_with_an_encoder_is_refused_before_a_process_starts(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    from transformers import T5Config

    pytest.importorskip("vllm")
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=512, decoder_start_token_id=0, **sizes)
    model = save(tmp_path / "t5", config, "T5ForConditionalGeneration")
    refused(runner, model, "t5 reads with an encoder")


def test_a_model_without_a_head_is_refused_before_a_process_starts(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    from transformers import Qwen3Config, Qwen3Model

    pytest.importorskip("vllm")
    chat = tokenizer()
    chat.save_pretrained(tmp_path)
    Qwen3Model(Qwen3Config(**small(vocab_size=len(chat)))).save_pretrained(tmp_path)
    refused(runner, tmp_path, "Qwen3Model writes no text")


@pytest.mark.parametrize(("on_cpu", "size"), [(True, 32), (False, None)])
def test_on_a_gpu_vllm_chooses_the_size_of_blocks(
    on_cpu: bool, size: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = pytest.importorskip("candor.engine.vllm_engine")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setattr(engine, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    args = engine._engine_args(EngineSettings(tmp_path, representation=REPRESENTATION))
    assert args.block_size == size
    assert args.worker_cls.endswith("CaptureCPUWorker" if on_cpu else "CaptureGPUWorker")


@pytest.mark.parametrize(
    ("cores", "options", "lists"),
    [
        ([0, 1], {}, "0,1"),
        ([0, 1], {"tensor_parallel_size": 2}, "0|1"),
        ([2, 3, 5, 7], {"data_parallel_size": 2}, "2,3|5,7"),
        ([0, 1], {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "0|1|0|1"),
    ],
)
def test_every_process_has_cores(cores: list[int], options: dict[str, int], lists: str) -> None:
    engine = pytest.importorskip("candor.engine.vllm_engine")
    assert engine._shared_out(cores, options) == lists
