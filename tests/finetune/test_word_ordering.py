"""The word-ordering data: what is asked, what is right, and that no sentence stands on two sides."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from candor.finetune import word_ordering as task
from candor.finetune.errors import SentencesError

SIZES = task.Sizes((2, 4), (6, 9), (10, 12), train=30, development=5, calibration=10, test=8, shifted=6)
WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "e", "i", "o", "u", "an", "en", "in")]


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, rng.randint(6, longest))).capitalize() + "." for _ in range(count)]


def test_prompt_and_answers_hold_the_same_words() -> None:
    for made in task.pairs("x", sentences(50), (2, 4), 0):
        start, shuffled = made["messages"][0]["content"].split("\n")
        right = made["positive"].removeprefix("<sentence>").removesuffix("</sentence>").split()
        count = int(made["id"].rsplit("-", 1)[1])
        assert right[:-count] == start.split()
        assert sorted(right[-count:]) == sorted(shuffled.split())
        wrong = made["negative"].replace("<sentence>", "").replace("</sentence>", "").split()
        assert wrong[:-count] == right[:-count]
        assert sorted(wrong) == sorted(right)
        assert wrong != right


def test_one_negative_in_ten_has_a_broken_tag() -> None:
    made = list(task.pairs("x", sentences(3000), (3, 3), 0))
    broken = [m["negative"] for m in made if not m["negative"].startswith("<sentence>")]
    broken += [
        m["negative"]
        for m in made
        if m["negative"].startswith("<sentence>") and not m["negative"].endswith("</sentence>")
    ]
    assert 0.08 < len(broken) / len(made) < 0.12


def test_words_to_order_differ() -> None:
    rng = random.Random(0)
    assert task.pair("x", "We saw the cat and the cat", 4, rng) is None
    assert task.pair("x", "We saw The the cat", 3, rng) is None
    assert task.pair("x", "We saw the big cat.", 3, rng)


def test_no_sentence_and_no_near_duplicate_on_two_sides() -> None:
    lines = sentences(200)
    near = [line.replace(".", "") + " too." for line in lines]
    files = task.build([*lines, *near, *lines], {"harvard": lines[:20]}, SIZES, 0)
    assert [len(files[name]) for name in ("train", "development", "test", "shifted")] == [30, 5, 8, 6]
    seen: dict[str, str] = {}
    for name, made in files.items():
        if name == "calibration-pairs":
            assert [m["id"] for m in made] == [m["id"] for m in files["calibration"]]
            continue
        for line in made:
            words = line["reference"].removeprefix("<sentence>").split()
            key = " ".join(words[:4])  # near-duplicates here share their beginning
            assert seen.setdefault(key, name) == name
    lengths = [len(m["reference"].split()) for m in files["shifted"]]
    assert min(lengths) >= 10
    assert max(len(m["reference"].split()) for m in files["train"]) <= 9


def test_near_duplicates_share_half_of_their_triples() -> None:
    one = "a b c d e f"  # triples abc bcd cde def
    assert task.distinct([one, "a b c d e g", "x b c d e y", "A, b c: d e f!"]) == [one, "x b c d e y"]


def test_detokenised_wikisplit(tmp_path: Path) -> None:
    file = tmp_path / "wiki.tsv"
    file.write_text(
        "whole .\tNow , see ( it ) . <::::> He said '' no '' .\nw\tIt 's well - known . <::::> lower .\n"
    )
    assert task.read_sentences(str(file)) == ["Now, see (it).", "It's well-known."]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SentencesError, match="expected 30 prompts for train, the sentences give"):
        task.build(sentences(10, longest=9), {}, SIZES, 0)
    with pytest.raises(SentencesError, match="cannot be read"):
        task.read_sentences(str(tmp_path / "none.txt"))


def test_the_same_seed_makes_the_same_files() -> None:
    lines = sentences(300)
    assert task.build(lines, {}, SIZES, 3) == task.build(lines, {}, SIZES, 3)
    assert task.build(lines, {}, SIZES, 3) != task.build(lines, {}, SIZES, 4)


def test_sentences_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:NAME: the hub's loader, on a data set that lies in a folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    named = {"said": "text", "told": "sentence", "silent": "words"}
    for folder, column in named.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text(f"id,{column}\n1,Rain fell. \n2,Snow fell.\n")
    for folder in ("said", "told"):
        assert task.read_sentences(f"hf:{tmp_path / folder}") == ["Rain fell.", "Snow fell."]
    with pytest.raises(SentencesError, match='no column "text" or "sentence", but id, words'):
        task.read_sentences(f"hf:{tmp_path / 'silent'}")
    with pytest.raises(SentencesError, match="cannot be loaded"):
        task.read_sentences(f"hf:{tmp_path / 'none'}")
