"""Identifies the served model by content: digests of weights, tokenizer and chat template.

A layer fitted on one model's states is invalid on another's, even if both have the same name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from candor.engine.base import AdapterIdentity, EngineError, ModelIdentity
from candor.engine.prompt import ChatFormat
from candor.engine.vllm_options import as_typed as options_as_typed

TOKENISING = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""Files that determine how text is tokenised; a model need not have all of them."""


def identify(
    model: Path,
    chat: ChatFormat,
    dtype: str,
    max_model_len: int,
    engine_options: Mapping[str, Any] | None = None,
) -> ModelIdentity:
    """Identity of the model directory `model` as served in `dtype` with sequences of up to `max_model_len` tokens.

    Raises EngineError if the directory is not a model (no config.json or no safetensors).
    """
    config = _read_config(model)
    architecture = (config.get("architectures") or ["unknown"])[0]
    hidden_size = _hidden_size(model, config)
    if switches := _rope_switches(config):
        # Longrope: vLLM uses the long factors for every sequence as soon as one may need them.
        config |= {"rope_at_max_model_len": ["long" if max_model_len > at else "short" for at in switches]}
    files = sorted({file for name in TOKENISING for file in model.glob(name) if file.is_file()})
    ends = hashlib.sha256(json.dumps(sorted(chat.end_ids)).encode()).digest()
    return ModelIdentity(
        name=model.name,
        architecture=architecture,
        hidden_size=hidden_size,
        dtype=dtype,
        config_sha256=_config_digest(config),
        weights_sha256=_digest(*sorted(model.glob("*.safetensors"))),
        tokenizer_sha256=_named_digest(
            {**{file.name: _content(file) for file in files}, "end of answer": ends}
        ),
        chat_template_sha256=hashlib.sha256(chat.template.encode()).hexdigest(),
        engine_options=dict(engine_options or {}),
    )


def as_before(identity: ModelIdentity, model: Path) -> ModelIdentity:
    """The identity as bundle formats 1 to 3 record it: two tokenizer files, and no maximum sequence length."""
    return replace(
        identity,
        config_sha256=_config_digest(_read_config(model)),
        tokenizer_sha256=_digest(*sorted(model.glob("tokenizer.json")), model / "tokenizer_config.json"),
    )


def identify_adapter(adapter: Path) -> AdapterIdentity:
    """Identity of the LoRA adapter in the directory `adapter`. Raises EngineError if there is none."""
    files = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not all(file.is_file() for file in files):
        raise EngineError(
            f"{adapter} is not an adapter's directory: expected adapter_config.json and adapter_model.safetensors "
            "in it, as PEFT writes them"
        )
    return AdapterIdentity(adapter.resolve().name, _digest(*files))


def differences(expected: ModelIdentity, actual: ModelIdentity) -> list[str]:
    """Returns the differing fields, one line each; empty if the models are the same. The name is not compared."""
    return [
        f"{field.name}: the bundle was made for {_shown(want)}, this model has {_shown(have)}"
        for field in fields(ModelIdentity)
        if field.name != "name"
        and (want := getattr(expected, field.name)) != (have := getattr(actual, field.name))
    ]


def _shown(value: object) -> object:
    return options_as_typed(value) if isinstance(value, dict) else value


def hidden_size_of(model: Path) -> int:
    """Returns the width of the model's states, without reading its weights. Raises EngineError."""
    return _hidden_size(model, _read_config(model))


def _read_config(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    if not file.is_file() or not any(model.glob("*.safetensors")):
        raise EngineError(
            f"{model} is not a model directory: expected config.json and *.safetensors in it; "
            "`make setup` prepares the demo model"
        )
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _hidden_size(model: Path, config: dict[str, Any]) -> int:
    """Width of the states before the LM head, under any name and at any level of the configuration.

    OPT 350M alone has a width for them that differs from its layers'.
    """
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        text = loaded.get_text_config()
        size = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)
    except (OSError, ValueError, KeyError):  # vLLM may know an architecture that transformers does not
        size = config.get("text_config", config).get("hidden_size")
    if not isinstance(size, int):
        raise EngineError(
            f"{model / 'config.json'} does not say how wide the model's states are: no hidden_size"
        )
    return size


def _rope_switches(config: dict[str, Any]) -> list[int]:
    """Lengths at which a model's rotary embedding changes; empty without longrope."""
    text = config.get("text_config", config)
    ropes = [text.get(name) for name in ("rope_parameters", "rope_scaling")]
    ropes += [part for rope in ropes if isinstance(rope, dict) for part in rope.values()]  # by kind of layer
    found = {
        rope.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
        for rope in ropes
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su")
    }
    return sorted(at for at in found if at is not None)


def _config_digest(config: dict[str, Any]) -> str:
    """Digest of config.json's model fields (layers, rotary base, norms), without those on who wrote it."""
    aside = {"transformers_version", "_name_or_path", "torch_dtype", "dtype"}
    kept = {key: value for key, value in config.items() if key not in aside}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _named_digest(contents: dict[str, bytes]) -> str:
    """Digest of names and contents: a missing file differs from an empty one and from another file."""
    listed = {name: content.hex() for name, content in contents.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(_content(file))
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    found = file.stat()
    return _content_then(file.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _content_then(file: Path, _size: int, _changed: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
