"""The demo's model: two runs' adapters as one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from candor.finetune.merge import merge
from demo.model import stack

TARGET = "model.layers.0.mlp.down_proj"


def whole(*shape: int) -> torch.Tensor:
    """Small whole numbers, so that bfloat16 loses nothing of their products."""
    return torch.randint(-2, 3, shape).float()


def adapter(out: Path, rank: int, alpha: int) -> Path:
    out.mkdir()
    name = f"base_model.model.{TARGET}.lora_"
    weights = {f"{name}A.weight": whole(rank, 6), f"{name}B.weight": whole(4, rank)}
    save_file(weights, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    return out


def test_stacked_adapters_are_one_after_the_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{TARGET}.weight": whole(4, 6).bfloat16()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    first, second = adapter(tmp_path / "first", 2, 4), adapter(tmp_path / "second", 1, 1)

    merge(base, first, tmp_path / "once")
    merge(tmp_path / "once", second, tmp_path / "twice")
    stack([first, second], tmp_path / "stacked")
    merge(base, tmp_path / "stacked", tmp_path / "at once")

    expected = load_file(tmp_path / "twice" / "model.safetensors")
    found = load_file(tmp_path / "at once" / "model.safetensors")
    assert torch.equal(found[f"{TARGET}.weight"], expected[f"{TARGET}.weight"])
    assert not torch.equal(
        found[f"{TARGET}.weight"], load_file(base / "model.safetensors")[f"{TARGET}.weight"]
    )
