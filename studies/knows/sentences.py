"""More sentences of the demo's kind, which neither model nor bundle has seen: the base model tells other stories.

    python -m studies.knows.sentences --model BASE --out var/knows/sentences.txt

Stories are drawn with another seed and kept beside `out`, so that a run that was stopped goes on. A sentence that
shares its beginning, its end or its words with one of the demo's is left out.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from demo.sentences import PROMPTS, TOPICS, distinct, sentences

DEMO = Path(__file__).resolve().parents[2] / "demo/sentences.txt"
SEED = 20261127
AT_ONCE = 120


def tell(model: Path, kept: Path, stories: int) -> list[str]:
    """That many stories, from `kept` as far as they stand there."""
    jobs = list(product(PROMPTS, TOPICS.read_text(encoding="utf-8").splitlines()))
    random.Random(SEED).shuffle(jobs)
    told = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    if len(told) < stories:
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=AT_ONCE,
            seed=SEED,
            enforce_eager=True,
        )
        drawn = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=300)
        while len(told) < stories:
            batch = jobs[len(told) : min(len(told) + AT_ONCE, stories)]
            chats = [[{"role": "user", "content": ask.format(topic=topic)}] for ask, topic in batch]
            texts = [json.dumps(one.outputs[0].text) for one in llm.chat(chats, drawn, use_tqdm=False)]
            told += texts
            with kept.open("a", encoding="utf-8") as file:
                file.writelines(text + "\n" for text in texts)
            typer.echo(f"{len(told)} stories")
    return [json.loads(line) for line in told[:stories]]


def main(
    model: Annotated[Path, typer.Option(help="Directory of the base model.")],
    out: Annotated[Path, typer.Option(help="Where the sentences go, one a line.")],
    stories: Annotated[int, typer.Option(min=1, max=1000)] = 480,
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    told = tell(model, out.with_suffix(".stories"), stories)
    known = DEMO.read_text(encoding="utf-8").splitlines()
    fresh = set(distinct([*known, *(one for story in told for one in sentences(story))])) - set(known)
    out.write_text("\n".join(sorted(fresh)) + "\n", encoding="utf-8")
    typer.echo(f"{len(fresh)} sentences -> {out}")


if __name__ == "__main__":
    typer.run(main)
