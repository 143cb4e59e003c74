"""The demo's model before it was taught to judge itself: plain cross-entropy, the row that others are held to.

    python -m studies.knows.plain --base BASE --adapter demo/adapter --out MODEL

The demo's adapter is two, one above the other (demo/model.py): the first ranks are cross-entropy's.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from safetensors.torch import load_file, save_file

from candor.finetune.merge import merge, replace_directory

RANK = 16


def main(
    base: Annotated[Path, typer.Option(help="Directory of the base model.")],
    adapter: Annotated[Path, typer.Option(help="The demo's.")],
    out: Annotated[Path, typer.Option(help="Directory of the model.")],
) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    both = load_file(adapter / "adapter_model.safetensors")
    first = {
        name: (one[:RANK] if "lora_A" in name else one[:, :RANK]).contiguous() for name, one in both.items()
    }
    with TemporaryDirectory() as folder:
        save_file(first, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        scale = settings["lora_alpha"] / settings["r"]
        text = json.dumps(settings | {"r": RANK, "lora_alpha": scale * RANK})
        (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")
        replace_directory(out, lambda path: merge(base, Path(folder), path))
    typer.echo(f"-> {out}")


if __name__ == "__main__":
    typer.run(main)
