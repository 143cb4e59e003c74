"""Makes the demo's sentences: the base model writes them, then they are filtered.

The word-ordering task needs plain English sentences that may be committed. SmolLM2 writes stories and
explanations on a list of topics. Its texts are split into sentences, and those that are complete, plain,
distinct and of a useful length are kept.

    python -m demo.sentences --model DIR --stories FILE --out demo/sentences.txt

Stories are appended as they are written, so a run that was stopped continues where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

PROMPTS = (
    "Tell a story about {topic}. Use short, simple sentences.",
    "Write a long story for children about {topic}.",
    "Explain {topic} to a curious child in plain words.",
    "Describe a day in the life of someone who knows all about {topic}.",
    "Write a page of a novel about {topic}.",
    "Write a magazine article about {topic}.",
    "What happened last year with {topic}? Write a news report.",
    "Write a chapter of a schoolbook about {topic}.",
    "Write down your memories of {topic}.",
)
TOPICS = Path(__file__).with_name("topics.txt")
SHORTEST, LONGEST = 5, 32  # words; the longest serve as the shifted set

_PLAIN = re.compile(r"[A-Z][A-Za-z]*(?:[,;]? [a-zA-Z]+(?:'[a-z]+)?(?:-[a-z]+)?)+\.")
_BOUNDARY = re.compile(r"(?<=[.!?])[\"']?\s+")


def sentences(story: str) -> Iterator[str]:
    """Yields the complete plain sentences of a story: a capital letter first, words and commas, a full stop last."""
    for line in story.splitlines():
        for candidate in _BOUNDARY.split(line.strip()):
            words = candidate.split()
            if SHORTEST <= len(words) <= LONGEST and _PLAIN.fullmatch(candidate):
                yield candidate


def distinct(candidates: Iterable[str]) -> Iterator[str]:
    """Drops a sentence whose first five or last five words, or whose set of words, were seen before.

    Near-duplicates across a split would make every figure too good.
    """
    seen: set[object] = set()
    for sentence in candidates:
        words = re.findall(r"[a-z']+", sentence.lower())
        keys = {("first", *words[:5]), ("last", *words[-5:]), frozenset(words)}
        if not keys & seen and len(set(words)) > len(words) // 2:
            seen |= keys
            yield sentence


def tell_stories(model: Path, out: Path, rounds: int, batch_size: int = 120) -> None:
    """Appends one JSON line per story until every prompt was used `rounds` times."""
    from vllm import LLM, SamplingParams

    topics = TOPICS.read_text(encoding="utf-8").split("\n")[:-1]
    done = sum(1 for _ in out.open(encoding="utf-8")) if out.exists() else 0
    jobs = list(product(range(rounds), PROMPTS, topics))[done:]
    llm = LLM(str(model), dtype="bfloat16", max_model_len=512, max_num_seqs=batch_size, seed=done)
    settings = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=300)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        chats = [[{"role": "user", "content": p.format(topic=t)}] for _, p, t in batch]
        with out.open("a", encoding="utf-8") as file:
            for (_, _, topic), answer in zip(batch, llm.chat(chats, settings, use_tqdm=False), strict=True):
                file.write(json.dumps({"topic": topic, "story": answer.outputs[0].text}) + "\n")
        typer.echo(f"{sum(1 for _ in out.open(encoding='utf-8'))} stories")


def main(
    model: Annotated[Path, typer.Option(help="directory of the base model")],
    stories: Annotated[Path, typer.Option(help="where the raw stories go (JSON lines)")],
    out: Annotated[Path, typer.Option(help="where the sentences go, one a line")],
    rounds: Annotated[int, typer.Option(help="stories per topic and prompt")] = 1,
) -> None:
    tell_stories(model, stories, rounds)
    texts = [json.loads(line)["story"] for line in stories.open(encoding="utf-8")]
    kept = list(distinct(s for text in texts for s in sentences(text)))
    out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    typer.echo(f"{len(kept)} sentences from {len(texts)} stories -> {out}")


if __name__ == "__main__":
    typer.run(main)
