"""A tiny model with random weights and a bundle that was calibrated for it: real vLLM at a hundred answers a second.

    python -m benchmarks.zoo.calibrated FOLDER          FOLDER/model and FOLDER/bundle, in under a minute

What it says is noise. It serves where a server is loaded or broken, and not where answers are read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.zoo.tiny import save, seeing, small

RIGHT, WRONG = "......", "!!!!!!"


def prompt(number: int) -> str:
    """The nth prompt of those that the bundle knows."""
    return f"Item {number}."


def calibrated(folder: Path, *, sees: bool = False) -> tuple[Path, Path]:
    """The model's directory and the bundle's; made where they are not there. sees: of one that looks at images."""
    from transformers import LlamaConfig

    model, bundle = folder / "model", folder / "bundle"
    if bundle.is_dir():
        return model, bundle
    folder.mkdir(parents=True, exist_ok=True)
    if sees:
        seeing(model)
    else:
        save(model, LlamaConfig(**small(num_hidden_layers=2)), "LlamaForCausalLM")
    rows = [
        {
            "id": f"r{n}",
            "messages": [{"role": "user", "content": prompt(n)}],
            "response": WRONG if n % 3 == 0 else RIGHT,
            "label": int(n % 3 != 0),
        }
        for n in range(300)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "--model": model,
        "--data": folder / "data.jsonl",
        "--out": bundle,
        "--alpha": "0.8",
        "--engine": "transformers",
        "--dtype": "float32",
        "--max-model-len": "1024",
        "--max-tokens": "32",
        "--rounds": "1",
        "--epochs": "5",
    }
    command = [sys.executable, "-m", "candor.app.cli", "calibrate"]
    subprocess.run(command + [str(part) for pair in given.items() for part in pair], check=True)
    return model, bundle


if __name__ == "__main__":
    calibrated(Path(sys.argv[1]))
