"""A language model small enough to be trained in a test, with a real tokenizer, and pairs to train it on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.finetune import word_ordering
from candor.finetune.data import Pair
from candor.finetune.training import Training


@pytest.fixture(scope="session")
def tiny_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers of width 32 behind SmolLM2's tokenizer and chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(base_model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(
        base_model,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(out)
    return out


class Killed(Exception):
    pass


def run_until(training: Training, stop: int) -> None:
    """Runs until it has made so many steps, and is killed there."""
    step = training._step

    def killed(epoch: int, numbers: Any) -> float:
        if training.progress.step == stop:
            raise Killed
        return step(epoch, numbers)

    training._step = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        training.run()


def make_pairs(name: str, count: int) -> list[Pair]:
    rng = random.Random(name)
    words = ["red", "blue", "green", "old", "new", "small", "large", "kind", "wild", "calm", "proud", "young"]
    made = []
    while len(made) < count:
        sentence = " ".join(["The", *rng.sample(words, 6), "end."])
        if record := word_ordering.pair(f"{name}-{len(made)}", sentence, 3, rng):
            made.append(Pair(**(record | {"messages": tuple(record["messages"])})))
    return made


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    return make_pairs("train", 32)


@pytest.fixture(scope="session")
def held_out() -> list[Pair]:
    return make_pairs("held out", 16)
