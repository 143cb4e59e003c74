"""Adapters laid over one vLLM: each answers as its merged model does, and no state leaks from one to another.

The demo's adapter, its half, and the model without any, held to the transformers engine on the merged models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from candor.engine.base import EVIDENCE, Engine, EngineError, Generation, Representation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.finetune.merge import merge

pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "var/models/smollm2-135m-instruct"
ADAPTER = ROOT / "demo/adapter"
REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
SENTENCE = "Sentence: The {} ran home before the"
ASK = "Finish the sentence with the words in the right order.\n" + SENTENCE + "\nWords: began. storm"


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter with half its effect."""
    out = tmp_path_factory.mktemp("adapters") / "halved"
    out.mkdir()
    (out / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    weights = load_file(ADAPTER / "adapter_model.safetensors")
    save_file(
        {n: w / 2 if "lora_B" in n else w for n, w in weights.items()}, out / "adapter_model.safetensors"
    )
    return out


@pytest.fixture(scope="module")
def views(halved: Path, runner: asyncio.Runner) -> Iterator[dict[str, Engine]]:
    settings = EngineSettings(
        model=BASE,
        representation=REPRESENTATION,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_bytes=1 << 28,
        eager=True,
        adapters=(ADAPTER, halved),
    )
    engine = runner.run(start_engine(settings))
    under = {
        name: engine.with_adapter(path, REPRESENTATION)
        for name, path in (("whole", ADAPTER), ("half", halved))
    }
    yield {"none": engine, **under}
    runner.run(engine.close())


@pytest.fixture(scope="module")
def references(
    halved: Path, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Engine]:
    models = {"none": BASE}
    for name, adapter in (("whole", ADAPTER), ("half", halved)):
        models[name] = tmp_path_factory.mktemp("merged") / name
        merge(BASE, adapter, models[name])
    return {
        name: runner.run(
            start_engine(EngineSettings(model, "transformers", REPRESENTATION, "float32", max_model_len=512))
        )
        for name, model in models.items()
    }


async def answer(engine: Engine, prompt: list[int]) -> Generation:
    *_, last = [item async for item in engine.generate(prompt, Sampling(max_tokens=32))]
    assert isinstance(last, Generation)
    return last


def test_answers_in_one_batch_are_each_exact(
    views: dict[str, Engine], references: dict[str, Engine], runner: asyncio.Runner
) -> None:
    chat = ChatFormat.from_directory(BASE)
    prompts = [
        chat.encode_chat([{"role": "user", "content": ASK.format(who)}]) for who in ("children", "dogs")
    ]
    jobs = [(name, prompt) for prompt in prompts for name in views] * 2  # the second time from the cache

    async def together() -> list[Generation]:
        return await asyncio.gather(*(answer(views[name], prompt) for name, prompt in jobs))

    seen: dict[str, torch.Tensor] = {}
    for (name, prompt), found in zip(jobs, runner.run(together()), strict=True):
        assert found.hidden is not None
        assert found.hidden.complete
        expected = runner.run(references[name].summarise(prompt, found.token_ids))
        assert found.hidden.positions == expected.positions
        # Merged weights are rounded to what the model is stored in; without an adapter nothing is merged.
        bound = 1e-4 if name == "none" else 2e-2
        for part in ("mean", "last"):
            have, want = getattr(found.hidden, part), getattr(expected, part)
            assert (have - want).norm() <= bound * want.norm(), (name, part)
        seen[name] = found.hidden.mean
    assert (seen["whole"] - seen["none"]).norm() > 0.1 * seen["none"].norm()
    assert (seen["half"] - seen["whole"]).norm() > 0.1 * seen["whole"].norm()


def test_a_given_response_is_judged_under_its_adapter(
    views: dict[str, Engine], references: dict[str, Engine], runner: asyncio.Runner
) -> None:
    chat = ChatFormat.from_directory(BASE)
    prompt = chat.encode_chat([{"role": "user", "content": ASK.format("cats")}])
    response = chat.encode_response("<sentence>The cats ran home before the storm began.</sentence>")
    for name, engine in views.items():
        have = runner.run(engine.summarise(prompt, response))
        want = runner.run(references[name].summarise(prompt, response))
        bound = 1e-4 if name == "none" else 2e-2
        assert (have.evidence - want.evidence).norm() <= bound * want.evidence.norm(), name


def test_an_adapter_that_was_not_started_with_is_refused(views: dict[str, Engine], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="started without"):
        views["none"].with_adapter(tmp_path, REPRESENTATION)


def test_an_adapter_beyond_the_layers_is_refused(tmp_path: Path, runner: asyncio.Runner) -> None:
    (tmp_path / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}
    save_file(head, tmp_path / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="lm_head"):
        runner.run(start_engine(EngineSettings(BASE, representation=REPRESENTATION, adapters=(tmp_path,))))
