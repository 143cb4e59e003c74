"""Whatever changes tokens, their ends or the states is another model; a bundle made before is still known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.tiny import save, small, tokenizer
from candor.engine.base import EngineError, ModelIdentity
from candor.engine.identity import as_before, differences, identify
from candor.engine.prompt import ChatFormat


def llama(directory: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig

    return save(directory, LlamaConfig(**small(num_hidden_layers=1, **changes)), "LlamaForCausalLM")


def identity(model: Path, max_model_len: int = 512) -> ModelIdentity:
    return identify(model, ChatFormat.from_directory(model), "float32", max_model_len)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tekken.json",
    ],
)
def test_a_file_more_or_another_is_another_model(tmp_path: Path, name: str) -> None:
    model = llama(tmp_path)
    found, chat = [], ChatFormat.from_directory(model)
    for content in (None, b"", b"{}"):
        if content is not None:
            (model / name).write_bytes(content)
        found.append(identify(model, chat, "float32", 512))
    assert len({one.tokenizer_sha256 for one in found}) == 3
    assert "tokenizer_sha256" in differences(found[0], found[1])[0]


def test_the_same_content_under_another_name_is_another_model(tmp_path: Path) -> None:
    model = llama(tmp_path)
    chat, found = ChatFormat.from_directory(model), []
    for name in ("vocab.json", "added_tokens.json"):
        (model / name).write_text("{}", encoding="utf-8")
        found.append(identify(model, chat, "float32", 512).tokenizer_sha256)
        (model / name).unlink()
    assert found[0] != found[1]


def test_another_token_that_ends_answers_is_another_model(tmp_path: Path) -> None:
    model = llama(tmp_path)
    before = identity(model)
    file = model / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"transformers_version": "0"}), encoding="utf-8")
    assert identity(model) == before
    file.write_text(json.dumps(config | {"eos_token_id": [2, 30]}), encoding="utf-8")
    assert "tokenizer_sha256" in differences(before, identity(model))[0]


def test_earlier_bundles_know_their_model_by_fewer_files(tmp_path: Path) -> None:
    model = llama(tmp_path)
    now, earlier = identity(model), as_before(identity(model), model)
    assert differences(now, earlier)
    assert now.weights_sha256 == earlier.weights_sha256
    two = (
        hashlib.sha256((model / name).read_bytes()).digest()
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    assert earlier.tokenizer_sha256 == hashlib.sha256(b"".join(two)).hexdigest()
    (model / "vocab.json").write_text("{}", encoding="utf-8")
    assert as_before(identity(model), model) == earlier
    assert identity(model) != now


@pytest.mark.parametrize("nested", [False, True])
def test_longrope_is_another_model_where_the_long_factors_are_taken(tmp_path: Path, nested: bool) -> None:
    model = llama(tmp_path)
    assert identity(model, 64) == identity(model, 512)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4}
    original = {"original_max_position_embeddings": 128}
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"rope_parameters": rope | original} if nested else {"rope_parameters": rope, **original}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert identity(model, 64) == identity(model, 128)
    assert "config_sha256" in differences(identity(model, 128), identity(model, 129))[0]


def test_the_width_of_the_states_wherever_it_stands(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, OPTConfig

    model = llama(tmp_path)
    made = [
        GPT2Config(n_embd=96, n_head=4, n_layer=1, vocab_size=512),
        Gemma3Config(text_config=Gemma3TextConfig(**small(hidden_size=80)).to_dict()),
        OPTConfig(**small(word_embed_proj_dim=64)),
    ]
    for config, width in zip(made, (96, 80, 64), strict=True):
        config.save_pretrained(model)
        assert identity(model).hidden_size == width
    (model / "config.json").write_text(json.dumps({"model_type": "unheard of", "width": 3}), encoding="utf-8")
    with pytest.raises(EngineError, match="no hidden_size"):
        identify(model, ChatFormat(tokenizer()), "float32", 512)
