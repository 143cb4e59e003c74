"""Makes the word-ordering task of arXiv 2510.26183 from any sentences.

The last words of a sentence are removed and shuffled; the model writes the whole sentence and then its own
verification tag. There is one right answer, so the verifier needs no judge.

    train.jsonl             pairs: a right answer and a static wrong one (finetune.data)
    development.jsonl       the same of other sentences, to choose the checkpoint
    calibration-pairs.jsonl the same again, and
    calibration.jsonl       their prompts, to be answered by the model (calibration.data)
    test.jsonl              held out
    shifted.jsonl           sentences longer than any of the others
    NAME.jsonl              a separate test set for every further file of sentences

A static negative is the right answer with its last words in another order; one in ten also lacks the opening,
the closing or both sentence tags. No sentence or near-duplicate is in two sets: of sentences that share half of
their word triples (Jaccard), one is kept.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.finetune.errors import SentencesError

SYSTEM_PROMPT = "Finish the sentence with these words in order."
"""Describes the task; the prompt itself has only the words, since every token costs."""

SHARE_BROKEN = 0.1
NEAR = 0.5
_SPACED = re.compile(r" (?=[,.;:?!%)'])|(?<=\() ")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()%-]*[.?!]")


@dataclass(frozen=True)
class Sizes:
    """words: (min, max) words removed. length, shifted_length: (min, max) words per sentence. Others: sentences."""

    words: tuple[int, int] = (3, 3)
    length: tuple[int, int] = (5, 60)
    shifted_length: tuple[int, int] = (60, 60)
    train: int = 5000
    development: int = 500
    calibration: int = 5000
    test: int = 2000
    shifted: int = 2000


def read_sentences(source: str) -> list[str]:
    """Reads a text file (one sentence per line), the simple sentences of a WikiSplit table (.tsv), or `hf:NAME`,
    the column "text" (or "sentence") of a data set's training part.

    Raises SentencesError if they cannot be read.
    """
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"))
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SentencesError(f"{source} cannot be read as UTF-8 text: {error}") from error
    if not source.endswith(".tsv"):
        return [line.strip() for line in lines if line.strip()]
    simple = (piece for line in lines for piece in line.split("\t")[-1].split("<::::>"))
    return [s for s in map(detokenise, simple) if _PLAIN.fullmatch(s) and "''" not in s]


def detokenise(text: str) -> str:
    """Removes spaces between words and punctuation: "Now , see ( it ) ." -> "Now, see (it)."."""
    return _SPACED.sub("", " ".join(text.split())).replace(" - ", "-")


def _from_hub(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SentencesError('hf:NAME needs the package "datasets": pip install datasets') from error
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # no common class: hub, files, formats
        raise SentencesError(f"hf:{name} cannot be loaded: {error}") from error
    column = next((c for c in ("text", "sentence") if c in rows.column_names), None)
    if column is None:
        raise SentencesError(
            f'hf:{name} has no column "text" or "sentence", but {", ".join(rows.column_names)}'
        )
    return [str(text).strip() for text in rows[column]]


def distinct(sentences: Iterable[str]) -> list[str]:
    """Removes near-duplicates: of sentences that share half of their word triples, the first is kept."""
    kept: list[str] = []
    sizes: list[int] = []
    by_triple: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for sentence in sentences:
        words = re.findall(r"\w+", sentence.lower())
        triples = set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}
        shared = Counter(i for triple in triples for i in by_triple[triple])
        if any(count / (len(triples) + sizes[i] - count) >= NEAR for i, count in shared.items()):
            continue
        for triple in triples:
            by_triple[triple].append(len(kept))
        kept.append(sentence)
        sizes.append(len(triples))
    return kept


def completion(sentence: str) -> str:
    """The answer that gives `sentence`, without the verification tag."""
    return f"<sentence>{sentence}</sentence>"


def pair(name: str, sentence: str, count: int, rng: random.Random) -> dict[str, Any] | None:
    """Makes a prompt with a right and a wrong answer; None if two of the words to order are the same."""
    words = sentence.split()
    start, last = words[:-count], words[-count:]
    if len(start) < 2 or len({word.lower() for word in last}) < count:
        return None
    wrong = last
    while wrong == last:
        wrong = rng.sample(last, count)
    content = f"{' '.join(start)}\n{' '.join(rng.sample(last, count))}"
    return {
        "id": f"{name}-{count}",
        "messages": [{"role": "user", "content": content}],
        "reference": completion(sentence),
        "verifier": "exact",
        "positive": completion(sentence),
        "negative": _maybe_broken(completion(" ".join([*start, *wrong])), rng),
    }


def _maybe_broken(response: str, rng: random.Random) -> str:
    if rng.random() >= SHARE_BROKEN:
        return response
    broken = rng.choice((("<sentence>",), ("</sentence>",), ("<sentence>", "</sentence>")))
    for tag in broken:
        response = response.replace(tag, "")
    return response


def pairs(name: str, sentences: Iterable[str], words: tuple[int, int], seed: int) -> Iterator[dict[str, Any]]:
    """Yields one pair per suitable sentence, with a number of words drawn uniformly from `words`."""
    rng = random.Random(f"{seed}:{name}")
    for index, sentence in enumerate(sentences):
        if made := pair(f"{name}-{index:05d}", sentence, rng.randint(*words), rng):
            yield made


def record(made: dict[str, Any]) -> dict[str, Any]:
    """Returns the pair in the format of `candor calibrate` and `candor evaluate`."""
    return {name: made[name] for name in ("id", "messages", "reference", "verifier")}


def build(
    sentences: Sequence[str], tests: Mapping[str, Sequence[str]], sizes: Sizes, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns file name -> its lines. tests: further test sets by name; no other set has near-duplicates of them.

    Raises SentencesError if there are too few sentences.
    """
    aside = distinct(line for lines in tests.values() for line in lines)
    usable = distinct([*aside, *sentences])[len(aside) :]
    random.Random(seed).shuffle(usable)
    usual = [s for s in usable if sizes.length[0] <= len(s.split()) <= sizes.length[1]]
    taken = set(usual)
    longer = [
        s
        for s in usable
        if sizes.shifted_length[0] <= len(s.split()) <= sizes.shifted_length[1] and s not in taken
    ]
    supply = pairs("sentence", usual, sizes.words, seed)
    train, development, calibration, test = (
        _take(name, supply, getattr(sizes, name)) for name in ("train", "development", "calibration", "test")
    )
    shifted = _take("shifted", pairs("longer", longer, sizes.words, seed), sizes.shifted)
    records = {"calibration": calibration, "test": test, "shifted": shifted} | {
        name: list(pairs(name, lines, sizes.words, seed)) for name, lines in tests.items()
    }
    return {"train": train, "development": development, "calibration-pairs": calibration} | {
        name: [record(made) for made in lines] for name, lines in records.items()
    }


def _take(name: str, supply: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    taken = [made for _, made in zip(range(count), supply, strict=False)]
    if len(taken) < count:
        raise SentencesError(
            f"expected {count} prompts for {name}, the sentences give {len(taken)}: "
            "add sentences, allow other lengths, or ask for fewer"
        )
    return taken


def write(files: dict[str, list[dict[str, Any]]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
