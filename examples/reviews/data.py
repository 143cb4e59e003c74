"""The reviews: sentences of product reviews, film reviews and editorials with the mean rating of twenty people.

They are in the source distribution of `vaderSentiment` (MIT; Hutto and Gilbert, ICWSM 2014) on PyPI, which
requirements.txt pins by its digest. Taken are sentences of 3 to 60 words, rated at least 0.5 away from neutral. The
rating's sign is the reference. All sentences of one review stand in one file.

    train, development    to fine-tune on, and to choose the checkpoint by
    calibration           to fit and certify on
    test                  held out
    films, editorials     other kinds of text under the same question: near and far strangers
"""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "reviews": "amazonReviewSnippets_GroundTruth.txt",
    "films": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
QUESTION = "Is the sentiment of this text positive or negative? Answer with one word.\n\n{text}"
COLUMNS = "prompt=question, reference=sentiment"
VERIFIER = "choice(positive, negative)"
SIZES = {"train": 400, "development": 80, "calibration": 1600}
"""Sentences, filled up review by review; the rest of the reviews is the test file."""
STRANGERS = 250
SEED = 20261126


@dataclass(frozen=True)
class Sentence:
    """kind: how people rate it, such as "mild, negative". A column more than a record needs, for the report."""

    id: str
    question: str
    sentiment: str
    opposite: str
    kind: str

    @classmethod
    def of(cls, name: str, rating: float, text: str) -> Sentence:
        words = ["negative", "positive"]
        right, wrong = words[rating > 0], words[rating < 0]
        strength = "strong" if abs(rating) >= 2 else "clear" if abs(rating) >= 1 else "mild"
        return cls(name, QUESTION.format(text=text), right, wrong, f"{strength}, {right}")


def download(folder: Path) -> dict[str, str]:
    """The texts of the rated sentences by name. pip checks the digest."""
    pinned = Path(__file__).with_name("requirements.txt")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "vaderSentiment"]
    subprocess.run([*pip, "--require-hashes", "-r", str(pinned), "-d", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as outer:
        inner = _member(outer, INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as several:
        return {name: _member(several, file).decode("utf-8") for name, file in FILES.items()}


def _member(archive: tarfile.TarFile, end: str) -> bytes:
    (name,) = (name for name in archive.getnames() if name.endswith(end) and "/._" not in name)
    stream = archive.extractfile(name)
    assert stream is not None  # a file, not a folder
    return stream.read()


def sentences(text: str) -> Iterator[Sentence]:
    """Those rated clearly enough, each once."""
    seen = set()
    for line in text.splitlines():
        name, rating, content = line.split("\t")
        key = " ".join(content.casefold().split())
        if abs(float(rating)) >= 0.5 and 3 <= len(content.split()) <= 60 and key not in seen:
            seen.add(key)
            yield Sentence.of(name, float(rating), content.strip())


def sets(texts: Mapping[str, str]) -> dict[str, list[Sentence]]:
    """All sets by name, dealt with a fixed seed."""
    draw = random.Random(SEED)
    by_review: dict[str, list[Sentence]] = {}
    for one in sentences(texts["reviews"]):
        by_review.setdefault(one.id.split("_")[0], []).append(one)
    reviews = list(by_review.values())
    draw.shuffle(reviews)
    made: dict[str, list[Sentence]] = {}
    for name, size in SIZES.items():
        made[name] = []
        while len(made[name]) < size:
            made[name] += reviews.pop()
    made["test"] = [one for review in reviews for one in review]
    for name in ("films", "editorials"):
        made[name] = draw.sample(list(sentences(texts[name])), STRANGERS)
    return made


def write(folder: Path) -> dict[str, int]:
    """Downloads, and writes a CSV file for each set, if they are not there yet; returns how many rows each has."""
    files = [*SIZES, "test", "films", "editorials"]
    if not all((folder / f"{name}.csv").exists() for name in files):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as downloaded:
            made = sets(download(Path(downloaded)))
        for name, rows in made.items():
            write_csv(folder / f"{name}.csv", rows)
    return {name: len(read_csv(folder / f"{name}.csv")) for name in files}


def write_csv(path: Path, rows: list[Sentence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(one.name for one in fields(Sentence))
        table.writerows(map(astuple, rows))


def read_csv(path: Path) -> list[Sentence]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Sentence(**row) for row in csv.DictReader(file)]
