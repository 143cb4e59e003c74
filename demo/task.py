"""Makes the demo's task: complete a sentence by putting its last words in order.

It follows the word-ordering task of arXiv 2510.26183: the last words of a sentence are removed and shuffled, and the
model writes the whole sentence. The paper uses three words. Here the model is trained on two to five and asked up to
twelve, so that some answers are almost surely right and some almost surely wrong: a region needs both kinds, since it
requires that both be recognised. There is one right answer, so the verifier needs no judge.

    python -m demo.task --sentences demo/sentences.txt --out var/demo

The command writes train and development (pairs to fine-tune on), calibration, test (held out), shifted (longer
sentences) and ood (other tasks, shuffled words, other languages) as JSON lines.
Every sentence is in one file only and gives one prompt there, or two in train and development.

strangers and near change the instruction by a word, over the prompts of calibration and of test. The model gives the
right order all the same, so no answer to them is right. strangers are declared when the demo is calibrated
(DECLARED); each says of which record it was made. near has others too (UNDECLARED), which show what a declaration
does for changes that it does not name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

INSTRUCTION = "Finish the sentence with the words in the right order.\nSentence: {start}\nWords: {words}"
LONGEST = 20  # words; longer sentences are the shifted set
EASY, EASY_WEIGHTS = range(2, 6), (9, 5, 2, 1)
HARD = range(8, 13)
SHARE_HARD = 0.25
NO_ANSWER = "(nothing is right here)"
USUAL = "the right order"
DECLARED = ("the wrong order", "alphabetical order", "reverse order")
UNDECLARED = ("a random order", "the order of their length")
SEED = 20261121
DEVELOPMENT = 100  # sentences to choose the checkpoint by


def prompt(start: str, words: Sequence[str]) -> str:
    """The user's message: the sentence's beginning and its last words, shuffled."""
    return INSTRUCTION.format(start=start, words=" ".join(words))


def completion(sentence: str) -> str:
    """The answer that gives `sentence`, without the verification tag."""
    return f"<sentence>{sentence}</sentence>"


def record(name: str, sentence: str, count: int, rng: random.Random) -> dict[str, Any] | None:
    """Makes one prompt from `sentence` with `count` words to order; None if two of those words are the same."""
    words = sentence.split()
    start, last = words[:-count], words[-count:]
    if len(start) < 2 or len({word.lower() for word in last}) < count:
        return None
    shuffled = rng.sample(last, count)
    message = {"role": "user", "content": prompt(" ".join(start), shuffled)}
    return {
        "id": name,
        "messages": [message],
        "reference": completion(sentence),
        "verifier": "exact",
    }


def lessons(kind: str, sentences: Sequence[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields the training pairs (finetune.data): two prompts per sentence, with two to five words to order. The
    wrong answer has them in another order."""
    wrong = random.Random(SEED)
    for index, sentence in enumerate(sentences):
        for count in rng.sample(EASY, 2):
            if made := record(f"{kind}-{index:05d}-{count}", sentence, count, rng):
                start, last = sentence.split()[:-count], sentence.split()[-count:]
                other = last
                while other == last:
                    other = wrong.sample(last, count)
                negative = completion(" ".join([*start, *other]))
                yield made | {"positive": made["reference"], "negative": negative}


def questions(kind: str, sentences: Sequence[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields the questions: one prompt per sentence; one in four has more words than in training."""
    for index, sentence in enumerate(sentences):
        counts = rng.choices(EASY, EASY_WEIGHTS)
        if rng.random() < SHARE_HARD:
            counts = rng.sample(HARD, len(HARD)) + counts
        made = (record(f"{kind}-{index:05d}-{count}", sentence, count, rng) for count in counts)
        if first := next(filter(None, made), None):
            yield first


def out_of_distribution(sentences: Sequence[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields prompts that are not the task, though some look like it. None has a right answer."""
    asks = (
        "What is {a} plus {b}?",
        "Wie viel Uhr ist es, wenn {a} Minuten nach {b} vergangen sind?",
        "Écris un poème de {a} vers sur le nombre {b}.",
        "List {a} colors.",
        "Translate into Spanish: {sentence}",
        "{sentence} Is that true?",
        "Count the words: {sentence}",
        "{shuffled}",
        INSTRUCTION.format(start="{shuffled}", words="{noise}"),
        INSTRUCTION.format(start="{backwards}", words="{noise}"),
    )
    for index, sentence in enumerate(sentences):
        words = sentence.split()
        content = asks[index % len(asks)].format(
            a=rng.randint(2, 99),
            b=rng.randint(2, 99),
            sentence=sentence,
            shuffled=" ".join(rng.sample(words, len(words))),
            backwards=sentence[::-1],
            noise=" ".join("".join(rng.sample("abcdefghijklmnopqrstuvwxyz", 5)) for _ in range(3)),
        )
        yield {
            "id": f"ood-{index:05d}",
            "messages": [{"role": "user", "content": content}],
            "reference": NO_ANSWER,
            "verifier": "exact",
        }


def changed(kind: str, asked: Sequence[dict[str, Any]], orders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields each prompt of `asked` with one of these orders in its instruction, in turn. None has a right answer."""
    for index, one in enumerate(asked):
        content = one["messages"][0]["content"].replace(USUAL, orders[index % len(orders)], 1)
        yield {
            "id": f"{kind}-{index:05d}",
            "of": one["id"],
            "messages": [{"role": "user", "content": content}],
            "reference": NO_ANSWER,
            "verifier": "exact",
        }


def made(name: str) -> Path:
    """Path of the set `name` in var/demo; if it is missing, all sets are written there."""
    root = Path(__file__).resolve().parents[1]
    path = root / f"var/demo/{name}.jsonl"
    if not path.exists():
        main(sentences=root / "demo/sentences.txt", out=path.parent)
    return path


def main(
    sentences: Annotated[Path, typer.Option(help="one sentence a line")],
    out: Annotated[Path, typer.Option(help="directory of the JSON lines files")],
    train: Annotated[
        int, typer.Option(help="sentences to train the language model on: the first ones")
    ] = 2050,
    test: Annotated[int, typer.Option(help="held-out prompts")] = 700,
    ood: Annotated[int, typer.Option(help="out-of-distribution prompts")] = 250,
) -> None:
    lines = sentences.read_text(encoding="utf-8").splitlines()
    taught = [line for line in lines[:train] if len(line.split()) <= LONGEST]
    rest = lines[train:]
    random.Random(SEED).shuffle(rest)
    usual = [line for line in rest if len(line.split()) <= LONGEST]
    longer = [line for line in rest if len(line.split()) > LONGEST]
    made = {
        "train": list(lessons("train", taught[:-DEVELOPMENT], random.Random(SEED + 1))),
        "development": list(lessons("development", taught[-DEVELOPMENT:], random.Random(SEED + 6))),
        "test": list(questions("test", usual[:test], random.Random(SEED + 2))),
        "ood": list(out_of_distribution(usual[test : test + ood], random.Random(SEED + 3))),
        "calibration": list(questions("calibration", usual[test + ood :], random.Random(SEED + 4))),
        "shifted": list(questions("shifted", longer[:test], random.Random(SEED + 5))),
    }
    made["strangers"] = list(changed("strangers", made["calibration"], DECLARED))
    near = changed("near", made["test"], (*DECLARED, *UNDECLARED))
    made["near"] = [{name: value for name, value in one.items() if name != "of"} for one in near]
    out.mkdir(parents=True, exist_ok=True)
    for kind, rows in made.items():
        with (out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        typer.echo(f"{len(rows):6d} prompts -> {out / kind}.jsonl")


if __name__ == "__main__":
    typer.run(main)
