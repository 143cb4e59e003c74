"""The demo's recipe: teaches SmolLM2 the word-ordering task and its verification tag.

python -m demo.train --model var/models/smollm2-135m-instruct --data var/demo/train.jsonl --out demo/adapter
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from demo.task import SEED, completion
from engine.base import Representation
from engine.prompt import ChatFormat
from finetune.examples import Example, negative, positive
from finetune.trainer import TrainingSettings, train_lora


def examples(data: Path, chat: ChatFormat, negatives: float) -> list[Example]:
    """A positive for every record and, for a share of them, a static negative: its words in another order."""
    rng = random.Random(SEED)
    tag = Representation().tag
    made = []
    for line in data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt_ids = chat.encode_chat(record["messages"])
        made.append(positive(chat, prompt_ids, record["reference"], tag))
        if rng.random() < negatives:
            count = len(record["messages"][-1]["content"].rsplit("Words: ", 1)[1].split())
            made.append(negative(chat, prompt_ids, _wrong(record["reference"], count, rng), tag))
    return made


def _wrong(reference: str, count: int, rng: random.Random) -> str:
    words = reference.removeprefix("<sentence>").removesuffix("</sentence>").split()
    last = words[-count:]
    while last == words[-count:]:
        last = rng.sample(last, count)
    return completion(" ".join(words[:-count] + last))


def main(
    model: Annotated[Path, typer.Option(help="directory of the base model")],
    data: Annotated[Path, typer.Option(help="records as `python -m demo.task` writes them")],
    out: Annotated[Path, typer.Option(help="where the adapter goes")],
    learning_rate: float = TrainingSettings.learning_rate,
    epochs: int = TrainingSettings.epochs,
    rank: int = TrainingSettings.lora_rank,
    negatives: float = 0.0,
    compile: bool = True,
) -> None:
    chat = ChatFormat.from_directory(model)
    settings = TrainingSettings(
        learning_rate=learning_rate,
        epochs=epochs,
        lora_rank=rank,
        lora_alpha=2 * rank,
        compile=compile,
        seed=SEED,
    )
    train_lora(model, examples(data, chat, negatives), out, settings)


if __name__ == "__main__":
    typer.run(main)
