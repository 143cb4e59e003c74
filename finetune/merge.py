"""Merges an adapter into its model, so that the result is served like any other model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes `base` with W + (lora_alpha / r) B A in place of every adapted W.

    It computes in float64, so that the bfloat16 result is the same on every machine, in any order of summation:
    the bundle identifies the model by its digest.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    lora = load_file(adapter / "adapter_model.safetensors")
    tensors = {
        name: t for shard in sorted(base.glob("*.safetensors")) for name, t in load_file(shard).items()
    }
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        tensors[target] = (tensors[target].double() + scale * (b @ a)).to(torch.bfloat16)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    write_model(out, tensors, json.loads((base / "config.json").read_text(encoding="utf-8")))


def write_model(out: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # another user may serve them
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def replace_directory(out: Path, write: Callable[[Path], None]) -> None:
    """Replaces `out` with what `write` writes; `out` is complete or absent if this is interrupted."""
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
