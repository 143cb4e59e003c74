"""Who is being served, by content: digests of weights, tokenizer and chat template.

A layer fitted on one model's states is void on another's, also where both bear the same name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from candor.engine.base import AdapterIdentity, EngineError, ModelIdentity
from candor.engine.prompt import ChatFormat


def identify(model: Path, chat: ChatFormat, dtype: str) -> ModelIdentity:
    """Identity of the model directory `model` as served in `dtype`.

    Raises EngineError where the directory is not a model (no config.json or no safetensors).
    """
    config_file = model / "config.json"
    weights = sorted(model.glob("*.safetensors"))
    if not config_file.is_file() or not weights:
        raise EngineError(
            f"{model} is not a model directory: expected config.json and *.safetensors in it; "
            "`make setup` prepares the demo model"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    return ModelIdentity(
        name=model.name,
        architecture=(config.get("architectures") or ["unknown"])[0],
        hidden_size=config["hidden_size"],
        dtype=dtype,
        config_sha256=_config_digest(config),
        weights_sha256=_digest(*weights),
        tokenizer_sha256=_digest(*sorted(model.glob("tokenizer.json")), model / "tokenizer_config.json"),
        chat_template_sha256=hashlib.sha256(chat.template.encode()).hexdigest(),
    )


def identify_adapter(adapter: Path) -> AdapterIdentity:
    """Identity of the LoRA adapter in the directory `adapter`. Raises EngineError where there is none."""
    files = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not all(file.is_file() for file in files):
        raise EngineError(
            f"{adapter} is not an adapter's directory: expected adapter_config.json and adapter_model.safetensors "
            "in it, as PEFT writes them"
        )
    return AdapterIdentity(adapter.resolve().name, _digest(*files))


def differences(expected: ModelIdentity, actual: ModelIdentity) -> list[str]:
    """What differs, one line each, empty where the two are the same model. The name does not count."""
    return [
        f"{field.name}: the bundle was made for {want}, this model has {have}"
        for field in fields(ModelIdentity)
        if field.name != "name"
        and (want := getattr(expected, field.name)) != (have := getattr(actual, field.name))
    ]


def _config_digest(config: dict[str, Any]) -> str:
    """Of what config.json says of the model itself: layers, rotary base, norms; not of who wrote it."""
    aside = {"transformers_version", "_name_or_path", "torch_dtype", "dtype"}
    kept = {key: value for key, value in config.items() if key not in aside}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
