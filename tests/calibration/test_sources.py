"""Data as people have it, read by kind; and what is read where it cannot be.

exports/ has what argilla 2.8.0 writes (`Dataset.records.to_list`, nested and flattened), and what label-studio-sdk
2.1.2's converter makes of tasks in Label Studio's own JSON.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.data import Record, load
from candor.calibration.errors import DataError
from candor.calibration.shapes import Reading, label_of
from candor.calibration.sources import read_rows

EXPORTS = Path(__file__).parent / "exports"
ROWS = [
    {"question": "Capital of France?", "answer": "Paris", "source": "a"},
    {"question": "Capital of Italy?", "answer": "Rome", "source": "b"},
]
CSV = 'question,answer,source\n"Capital of\nFrance?",Paris,a\nCapital of Italy?,Rome,b\n'
EXACT = Reading(verifier="exact")


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow import parquet as writer

    writer.write_table(Table.from_pylist(ROWS), path)


def on_disk(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


KINDS: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "JSON Lines": ("d.jsonl", jsonl(*ROWS), "JSON Lines"),
    "with a mark": ("d.jsonl", codecs.BOM_UTF8 + jsonl(*ROWS), "JSON Lines in UTF-8 with a byte order mark"),
    "UTF-16": ("d.jsonl", jsonl(*ROWS).decode().encode("utf-16"), "JSON Lines in UTF-16"),
    "UTF-16 unmarked": (
        "d.csv",
        CSV.replace("\nF", " F").encode("utf-16-le"),
        "CSV in UTF-16 without a byte order mark",
    ),
    "zipped": ("d.jsonl.gz", gzip.compress(jsonl(*ROWS)), "JSON Lines"),
    "array": ("d.json", json.dumps(ROWS).encode(), "JSON"),
    "indented": ("d.json", json.dumps(ROWS, indent=2).encode(), "JSON"),
    "one after another": ("d.json", "\n".join(json.dumps(r, indent=2) for r in ROWS).encode(), "JSON"),
    "under a name": ("d.json", json.dumps({"version": 1, "data": ROWS}).encode(), "JSON"),
    "CSV": ("d.csv", CSV.replace("\nF", " F").encode(), "CSV"),
    "semicolons": ("d.csv", CSV.replace("\nF", " F").replace(",", ";").encode(), "CSV with semicolons"),
    "tabs": ("d.tsv", CSV.replace("\nF", " F").replace(",", "\t").encode(), "CSV with tabs"),
    "Parquet": ("d.parquet", parquet, "Parquet"),
    "data set": ("d", on_disk, "Hugging Face data set"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    name, content, said = KINDS[kind]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    found = load(path, EXACT)
    asked = [(record.prompt, record.reference, record.verifier, record.response) for record in found.records]
    assert asked == [(row["question"], row["answer"], "exact", None) for row in ROWS]
    assert str(found.rows) == said
    assert found.summary() == (
        f'{path}: 2 records from {said}; prompt from "question"; reference from "answer"; not read: "source"'
    )
    assert [dict(record.row)["source"] for record in found.records] == ["a", "b"]
    assert len(found.rows.sha256) == 64


def test_rows_have_the_line_that_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(CSV)
    assert [record.line for record in load(path, EXACT).records] == [2, 4]
    assert load(path, EXACT).records[0].prompt == "Capital of\nFrance?"
    path = tmp_path / "d.json"
    path.write_text("\n\n" + json.dumps(ROWS, indent=1))
    assert [record.place for record in load(path, EXACT).records] == ["line 4", "line 9"]


def test_a_data_sets_split_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    one = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=features)
    path = tmp_path / "reviews"
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(path))
    with pytest.raises(
        DataError, match=r"has the splits train, test: say which, for example .*reviews@train"
    ):
        load(path)
    with pytest.raises(DataError, match="has no split dev, but train, test"):
        load(f"{path}@dev")
    reading = Reading.parse("prompt=text, reference=label", "choice(positive, negative)")
    records = load(f"{path}@train", reading).records
    assert [record.reference["answer"] for record in records] == ["positive", "negative"]
    assert [record.place for record in records] == ["row 1", "row 2"]


def seen(record: Record) -> tuple[str, Any, Any, Any]:
    return record.prompt, record.reference, record.response, record.label


FRANCE, ITALY, SPAIN = "Capital of France?", "Capital of Italy?", "Capital of Spain?"
JUDGED = [(FRANCE, None, "Paris", 1), (ITALY, None, "Milan", 0)]


@pytest.mark.parametrize(
    ("name", "columns", "expected", "program"),
    [
        ("argilla.json", "", JUDGED, "Argilla"),
        ("argilla-flat.json", "", JUDGED, "Argilla"),
        ("label-studio.json", "", [*JUDGED, (SPAIN, None, "Madrid", 1)], "Label Studio"),
        ("label-studio-min.json", "", [*JUDGED, (SPAIN, None, "Madrid", 1)], None),
        ("label-studio.csv", "label=verdict, response=answer", [*JUDGED, (SPAIN, None, "Madrid", 1)], None),
    ],
)
def test_exports(name: str, columns: str, expected: list[Any], program: str | None) -> None:
    found = load(EXPORTS / name, Reading.parse(columns))
    assert [seen(record) for record in found.records] == expected
    assert found.program == program
    assert [record.id for record in found.records] == ["1", "2", "3"][: len(expected)]


def test_annotators_who_disagree_leave_a_label_unknown() -> None:
    found = load(EXPORTS / "argilla.json")
    assert found.unknown == 1
    assert "1 of unknown label left out (33%)" in found.summary()


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FRANCE}]


PROGRAMS: list[tuple[Any, Any, str | None]] = [
    (
        {"messages": [*CHAT, {"role": "assistant", "content": "Paris", "weight": 1}]},
        (f"system: Be brief.\nuser: {FRANCE}", "Paris", None, None),
        "OpenAI fine-tuning",
    ),
    (
        {"messages": [*CHAT, {"role": "assistant", "content": "Rome"}], "label": "no"},
        (f"system: Be brief.\nuser: {FRANCE}", None, "Rome", 0),
        "OpenAI fine-tuning",
    ),
    ({"prompt": FRANCE, "completion": "Paris"}, (FRANCE, "Paris", None, None), None),
    ({"input": CHAT[1:], "ideal": "Paris"}, (FRANCE, "Paris", None, None), "OpenAI Evals"),
    ({"input": FRANCE, "ideal": ["Paris", "paris"]}, (FRANCE, ["Paris", "paris"], None, None), "OpenAI Evals"),
    ({"item": {"question": FRANCE, "expected": "Paris"}}, (FRANCE, "Paris", None, None), "OpenAI Evals"),
    (
        {"conversations": [{"from": "human", "value": FRANCE}, {"from": "gpt", "value": "Paris"}]},
        (FRANCE, "Paris", None, None),
        "ShareGPT",
    ),
    (
        {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
        ("Name the capital.\n\nFrance", "Paris", None, None),
        "Alpaca",
    ),
    ({"system": "A.", "prompt": FRANCE, "reference": 3}, (f"system: A.\nuser: {FRANCE}", "3", None, None), None),
    ({"prompt": FRANCE, "response": "", "label": False}, (FRANCE, None, "", 0), None),
    ({"prompt": FRANCE, "response": "Paris", "reference": "Paris"}, (FRANCE, "Paris", "Paris", None), None),
]  # fmt: skip
ROWS_OF_PROGRAMS = [row for row, _, _ in PROGRAMS]


@pytest.mark.parametrize(("row", "expected", "program"), PROGRAMS)
def test_rows_of_other_programs(row: Any, expected: Any, program: str | None, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(jsonl(row))
    found = load(path, EXACT)
    assert [seen(record) for record in found.records] == [expected]
    assert found.program == program


def test_messages_in_the_servers_forms(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Capital of "}, {"type": "text", "text": "France?"}]
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": parts},
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(jsonl({"messages": turns, "reference": "Paris"}))
    (record,) = load(path, EXACT).records
    assert record.prompt == f"system: Be brief.\nuser: Hi\nassistant: No.\nuser: {FRANCE}"


def test_a_table_keeps_lists_as_text(tmp_path: Path) -> None:
    rows = [json.dumps([{"role": "user", "content": FRANCE}]), str([{"role": "user", "content": ITALY}])]
    path = tmp_path / "d.csv"
    path.write_text(
        "messages,reference\n" + "".join('"{}","[1, 2]"\n'.format(row.replace('"', '""')) for row in rows)
    )
    records = load(path, Reading(verifier="json")).records
    assert [(record.prompt, record.reference) for record in records] == [(FRANCE, [1, 2]), (ITALY, [1, 2])]


@pytest.mark.parametrize(
    ("said", "label"),
    [(1, 1), (0, 0), (1.0, 1), (True, 1), (False, 0), ("1", 1), ("TRUE", 1), ("right", 1), ("Wrong", 0), (" yes ", 1),
     ("no", 0), ("pass", 1), ("incorrect", 0), ("0.0", 0), ("unknown", "unknown"), ("Unsure", "unknown")],
)  # fmt: skip
def test_labels(said: Any, label: Any) -> None:
    assert label_of(said) == label


BROKEN: list[tuple[str, bytes, str]] = [
    ("d.xlsx", b"PK\x03\x04rest", "is a spreadsheet or a zip file"),
    ("d.db", b"SQLite format 3\0", "is no text and no Parquet file"),
    ("d.txt", b"Capital of France?\nCapital of Italy?\n", "neither JSON nor the header of a table"),
    ("d.parquet", b"PAR1 and nothing else", "begins as a Parquet file, but cannot be read"),
    ("d.jsonl.gz", b"\x1f\x8b and nothing else", "begins as a gzip file, but cannot be unpacked"),
    ("d.csv", b"question,question\na,b\n", "two columns named question"),
    ("d.csv", b"question,answer\na,b,c\n", "line 2: 3 cells, but the header has 2"),
    ("d.csv", b'question,answer\n"a,b\nc,d\n', "line 2: unexpected end of data: is a quotation mark unclosed?"),
    ("d.csv", b"question,answer\n\xff,b\n", "line 2: not UTF-8 at byte 0: save the file as UTF-8"),
    ("d.csv", codecs.BOM_UTF16_LE + b"abc", "begins as UTF-16, but is not"),
    ("d.csv", b"question,answer\n", "holds no record"),
    ("d.json", b'[{"prompt": "a", "reference": "b"}, 3]', "record 2: expected an object, got a number"),
    ("d.json", b'[{"prompt": "a", "reference": "b"},', "line 1: not JSON"),
    ("d.jsonl", b'{"prompt": "a", "text": "b"}', 'missing "reference" (there are "prompt", "text")'),
    ("d.jsonl", b'{"text": "a", "label": 1}', 'missing "prompt" or "messages" (there are "text", "label")'),
    ("d.jsonl", b'{"prompt": "a", "label": "positive"}', "if the label is the right answer itself, say --columns"),
    ("d.jsonl", b'{"prompt": ["a"], "reference": "b"}', "content may have parts of type text alone"),
    ("d.jsonl", jsonl({"messages": [{"role": "tool", "content": "4"}], "reference": "b"}), "calls a tool or brings"),
    (
        "d.jsonl",
        jsonl({"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "reference": "b"}),
        "content may have parts of type text alone",
    ),
    ("d.jsonl", jsonl({"id": 1, "prompt": "a", "reference": "b"}, {"id": "1", "prompt": "c", "reference": "b"}),
     'line 2: id "1" stands on line 1 already'),
    ("d.jsonl", jsonl({"prompt": "a", "reference": "b"}, {"prompt": " a", "reference": "c"}),
     "line 2: same prompt as line 1, but another reference or verifier"),
    ("d.jsonl", jsonl({"item": {"a": 1}}), 'missing "prompt" or "messages" (there are "id", "a")'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), BROKEN)
def test_what_is_read_where_data_cannot_be(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path, EXACT)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_column_that_there_is_not_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match='no column "q"; there are "question", "answer"'):
        load(path, Reading.parse("prompt=q", "exact"))
    with pytest.raises(ValueError, match="there is no field query; the fields are id, messages, prompt"):
        Reading.parse("query=question")
    with pytest.raises(ValueError, match="expected FIELD=COLUMN"):
        Reading.parse("question")


def test_a_hub_without_a_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="expected hf:NAME, hf:NAME@SPLIT"):
        read_rows("hf:")

    def unreachable(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"hf:a/b cannot be loaded: no route\nIs the name right, and the network there\?"
    ):
        read_rows("hf:a/b")


def test_a_data_set_of_the_hub_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def given(*name: Any) -> Any:
        asked.append(name)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr("datasets.load_dataset", given)
    assert len(load("hf:openai/gsm8k:main@train", EXACT).records) == 2
    assert asked == [("openai/gsm8k", "main")]
