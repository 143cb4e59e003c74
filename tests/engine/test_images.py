"""States of prompts with images, held to a fresh pass of transformers over text and pixels. Needs torchvision."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.tiny import seeing
from candor.engine.base import EVIDENCE, EngineError, Generation, PromptStates, Representation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings

pytest.importorskip("vllm")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.model

REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
TWO = {"limit_mm_per_prompt": {"image": 2}}
SHAPES = {
    "one": ([(84, 84)], "Tell me of the sea."),
    "two, in chunks": ([(112, 56), (56, 112)], "The old man walked slowly by the sea. " * 8),
}


def settings(model: Path) -> EngineSettings:
    return EngineSettings(
        model,
        representation=REPRESENTATION,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_bytes=1 << 27,
        eager=True,
        vllm=TWO,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def engine(model: Path, runner: asyncio.Runner) -> Iterator[Any]:
    engine = runner.run(start_engine(settings(model), ChatFormat.from_directory(model)))
    yield engine
    runner.run(engine.close())


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()


def noise(size: tuple[int, int]) -> Any:
    from PIL import Image

    drawn = random.Random(str(size)).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, drawn)


@pytest.mark.parametrize("way", ["fresh", "cached"])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_those_of_text_and_pixels(
    engine: Any, reference: Any, model: Path, runner: asyncio.Runner, shape: str, way: str
) -> None:
    from transformers import AutoProcessor

    sizes, words = SHAPES[shape]
    images = [noise(size) for size in sizes]
    processor = AutoProcessor.from_pretrained(model)
    turn = {"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": words}]}
    text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    given = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    prompt_ids = given["input_ids"][0].tolist()

    async def answered() -> list[Any]:
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
        (prompt,) = await engine.llm.renderer.render_cmpl_async([asked])
        assert prompt["prompt_token_ids"] == prompt_ids
        params = engine.params(Sampling(max_tokens=20))
        return [part async for part in engine.write(prompt, params, capture=True, prompt_states=True)]

    def states(ids: list[int]) -> torch.Tensor:
        sequence = torch.tensor([ids])
        shown = {name: given[name] for name in ("pixel_values", "image_grid_thw")}
        seen = (sequence == reference.config.image_token_id).int()
        with torch.no_grad():
            found = reference.model(input_ids=sequence, mm_token_type_ids=seen, **shown)
        return found.last_hidden_state[0]

    if way == "cached":
        runner.run(answered())
    prompt, *_, answer = runner.run(answered())
    assert isinstance(prompt, PromptStates)
    assert isinstance(answer, Generation)
    assert answer.hidden is not None
    assert answer.hidden.complete
    closing, _ = engine._chat.closing(REPRESENTATION.tag)
    whole = [*prompt_ids, *answer.token_ids, *closing][: answer.hidden.positions]
    for found, ids in ((prompt, prompt_ids), (answer.hidden, whole)):
        expected = states(ids)
        for one, want in ((found.mean, expected.mean(0)), (found.last, expected[-1])):
            assert (one - want).norm() <= 1e-4 * want.norm()


def test_a_model_of_texts_does_not_start_with_images(runner: asyncio.Runner, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from benchmarks.zoo.tiny import save, small

    model = save(tmp_path / "model", LlamaConfig(**small()), "LlamaForCausalLM")
    with pytest.raises(EngineError, match="does not look at images"):
        runner.run(start_engine(settings(model), ChatFormat.from_directory(model)))
