"""Reads rows as people keep them: what a file is, and what it is encoded in, is found out and said.

    JSON Lines, JSON           one object a line, or a list of objects, or objects one after another, also indented
    CSV                        with a header; the delimiter is one of , ; tab |
    Parquet, Arrow             by pyarrow
    Hugging Face data set      DIR or DIR@SPLIT as `save_to_disk` writes it; hf:NAME, hf:NAME:CONFIG@SPLIT

Text is UTF-8, or what its byte order mark says. A row that cannot be read is a problem with its line, not an end.
What a row means is not decided here (`calibration.shapes`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from candor.calibration.errors import DataError
from candor.model_store import strict_json

Row = dict[str, Any]

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF8, "UTF-8 with a byte order mark", "utf-8-sig"),
)
_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_DELIMITERS = ",;\t|"
_LISTS = ("data", "records", "rows", "items", "examples", "samples", "questions")
"""Names under which a JSON object may hold all its rows."""
_HUB = re.compile(r"hf:(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_REMEDY = "It takes JSON Lines, JSON, CSV, Parquet, a data set's folder, or hf:NAME; save it as one of these."


@dataclass(frozen=True)
class Rows:
    """kind, encoding: in words, such as "CSV" and "UTF-16". unit: what numbers count, "line" or "row".

    rows: (number from 1, row). problems: what could not be read, each with its number. sha256: of the file's bytes,
    or of the rows where there is no single file.
    """

    kind: str
    encoding: str | None
    unit: str
    rows: list[tuple[int, Row]]
    problems: list[str] = field(default_factory=list)
    sha256: str = ""

    def __str__(self) -> str:
        return self.kind if self.encoding in (None, "UTF-8") else f"{self.kind} in {self.encoding}"


def read_rows(source: Path | str) -> Rows:
    """Raises DataError where there is nothing that rows could be read from."""
    name = str(source)
    if name.startswith("hf:"):
        return _from_hub(name)
    path, split = name, ""
    if "@" in name and not Path(name).exists():
        path, _, split = name.rpartition("@")
    if Path(path).is_dir():
        return _from_disk(Path(path), split)
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}; check the path") from error
    return replace_digest(_of_bytes(Path(name), content), hashlib.sha256(content).hexdigest())


def replace_digest(rows: Rows, sha256: str) -> Rows:
    return Rows(rows.kind, rows.encoding, rows.unit, rows.rows, rows.problems, sha256)


def _of_bytes(path: Path, content: bytes) -> Rows:
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} begins as a gzip file, but cannot be unpacked: {error}") from error
        path = path.with_suffix("") if path.suffix == ".gz" else path
    if content.startswith(b"PAR1"):
        return _parquet(path, content)
    if content.startswith(b"PK"):
        raise DataError(f"{path} is a spreadsheet or a zip file. {_REMEDY}")
    if content.startswith((b"SQLite format 3", b"\x80", b"ARROW1")):
        raise DataError(f"{path} is no text and no Parquet file. {_REMEDY}")
    text, encoding, problems = _decoded(path, content)
    is_json = path.suffix.lower() in _JSON_NAMES or text.lstrip()[:1] in "{["
    kind, lines = ("", []) if not is_json and text.strip() else _json(text)
    if not kind:
        kind, rows, more = _csv(path, text)
        return Rows(kind, encoding, "line", rows, sorted(problems + more, key=_number))
    unit = "line"
    if len({number for number, _ in lines}) < len(lines):  # a list on one line
        unit, lines = "record", list(enumerate((line for _, line in lines), start=1))
    rows, more = _parsed(lines, unit)
    return Rows(kind, encoding, unit, rows, sorted(problems + more, key=_number))


def _number(problem: str) -> int:
    found = re.match(r"\w+ (\d+)", problem)
    return int(found[1]) if found else 0


def _decoded(path: Path, content: bytes) -> tuple[str, str, list[str]]:
    """Returns text, the encoding's name, and problems. A line that is no UTF-8 is left out, as an empty one."""
    for mark, name, codec in _MARKS:
        if content.startswith(mark):
            try:
                return content.decode(codec), name, []
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} begins as {name}, but is not at byte {error.start}; save it as UTF-8"
                ) from error
    for at, codec in (
        (1, "utf-16-le"),
        (0, "utf-16-be"),
    ):  # without a mark: every other byte of ASCII is zero
        sample = content[:4000]
        if len(sample) >= 4 and sample[at::2].count(0) > 0.6 * len(sample) / 2:
            try:
                return content.decode(codec), "UTF-16 without a byte order mark", []
            except UnicodeDecodeError:
                break
    try:
        return content.decode("utf-8"), "UTF-8", []
    except UnicodeDecodeError:
        pass
    lines, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: not UTF-8 at byte {error.start}: save the file as UTF-8")
            lines.append("")
    return "\n".join(lines), "UTF-8", problems


def _json(text: str) -> tuple[str, list[tuple[int, str]]]:
    """The kind, and each row's line and text. JSON Lines if the first line is JSON by itself, or nothing else can be
    made of the whole."""
    first, *others = [line for line in text.split("\n") if line.strip()] or [""]
    if not others or not _is_whole(first) or first.strip().startswith("["):
        try:
            values = list(_values(text))
        except (ValueError, RecursionError):
            values = []
        if values:
            rows = list(_inside(values))
            one_line = len(rows) == 1 and rows[0][1] == first.strip()
            return "JSON Lines" if one_line else "JSON", rows
    return "JSON Lines", [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


_SPACE = re.compile(r"[ \t\r\n]*")


def _values(text: str, start: int = 0, end: str = "") -> Iterator[tuple[int, str]]:
    """Yields (line from 1, text) of JSON values that follow each other, up to the text's end or the sign `end`."""
    decoder, at, line, counted = json.JSONDecoder(), start, 1 + text.count("\n", 0, start), start
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches anywhere
        if end and text.startswith(end, at):
            return
        if at == len(text):
            if end:
                raise ValueError(f"no {end} at the end")
            return
        _, after = decoder.raw_decode(text, at)
        line, counted = line + text.count("\n", counted, at), at
        yield line, text[at:after]
        at = _SPACE.match(text, after).end()  # type: ignore[union-attr]
        if end and text.startswith(",", at):
            at += 1


def _inside(values: Sequence[tuple[int, str]]) -> Iterable[tuple[int, str]]:
    """The rows of a list, or of an object that holds nothing but one list of objects; else the values themselves."""
    if len(values) != 1:
        return values
    ((line, text),) = values
    if text.startswith("["):
        return [(line - 1 + number, row) for number, row in _values(text, 1, "]")]
    whole = json.loads(text)
    if not isinstance(whole, dict):
        return values
    lists = [key for key, value in whole.items() if isinstance(value, list) and key in _LISTS]
    return [(line, json.dumps(row)) for row in whole[lists[0]]] if lists else values


def _parsed(lines: Iterable[tuple[int, str]], unit: str) -> tuple[list[tuple[int, Row]], list[str]]:
    rows: list[tuple[int, Row]] = []
    problems = []
    for number, line in lines:
        try:
            rows.append((number, _object(line)))
        except ValueError as error:
            problems.append(f"{unit} {number}: {error}")
    return rows, problems


def _object(line: str) -> Row:
    """The JSON object on a line. Raises ValueError with what is wrong, without the line number."""
    try:
        fields = strict_json.parse(line.encode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {kind_of(fields)}")
    return fields


def _csv(path: Path, text: str) -> tuple[str, list[tuple[int, Row]], list[str]]:
    header = text.lstrip("\n").split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    if header.count(delimiter) == 0:
        raise DataError(
            f"{path} begins with {header[:60]!r}: neither JSON nor the header of a table with two columns. {_REMEDY}"
        )
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Row]] = []
    problems: list[str] = []
    names: list[str] = []
    try:
        while True:
            start = reader.line_num + 1
            cells = next(reader)
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise DataError(f"{path} has two columns named {', '.join(twice)}: rename one of each")
            elif len(cells) != len(names):
                problems.append(f"line {start}: {len(cells)} cells, but the header has {len(names)}")
            else:
                rows.append((start, dict(zip(names, cells, strict=True))))
    except StopIteration:
        pass
    except csv.Error as error:
        problems.append(f"line {start}: {error}: is a quotation mark unclosed?")
    kind = {",": "CSV", "\t": "CSV with tabs", ";": "CSV with semicolons", "|": "CSV with bars"}[delimiter]
    return kind, rows, problems


def _parquet(path: Path, content: bytes) -> Rows:
    parquet = _needed("pyarrow.parquet", "a Parquet file")
    try:
        table = parquet.read_table(io.BytesIO(content))
    except Exception as error:  # pyarrow's errors have no common base
        raise DataError(f"{path} begins as a Parquet file, but cannot be read: {error}") from error
    return Rows("Parquet", None, "row", _numbered(table.to_pylist()))


def _from_disk(path: Path, split: str) -> Rows:
    datasets = _needed("datasets", "a data set's folder")
    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        raise DataError(
            f"{path} is a folder, but not of a data set that `save_to_disk` wrote; give one of its files"
        )
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # no common class: files, formats, versions
        raise DataError(f"{path} cannot be loaded as a data set: {error}") from error
    return _of_dataset(str(path), found, split)


def _from_hub(source: str) -> Rows:
    datasets = _needed("datasets", "hf:NAME")
    given = _HUB.fullmatch(source)
    if given is None:
        raise DataError(f"expected hf:NAME, hf:NAME@SPLIT or hf:NAME:CONFIG@SPLIT, got {source}")
    try:
        found = datasets.load_dataset(given["name"], given["config"])
    except Exception as error:  # no common class: hub, files, formats
        raise DataError(
            f"{source} cannot be loaded: {error}\nIs the name right, and the network there?"
        ) from error
    return _of_dataset(source, found, given["split"] or "")


def _of_dataset(source: str, found: Any, split: str) -> Rows:
    if isinstance(found, Mapping):
        if not split and len(found) > 1:
            raise DataError(
                f"{source} has the splits {', '.join(found)}: say which, for example {source}@{next(iter(found))}"
            )
        if split and split not in found:
            raise DataError(f"{source} has no split {split}, but {', '.join(found)}")
        found = found[split or next(iter(found))]
    names = {name: kind.int2str for name, kind in found.features.items() if hasattr(kind, "int2str")}
    rows = [{name: _named(names.get(name), value) for name, value in row.items()} for row in found.to_list()]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return replace_digest(Rows("Hugging Face data set", None, "row", _numbered(rows)), digest)


def _named(name: Callable[[int], str] | None, value: Any) -> Any:
    """A class of a ClassLabel column by its name."""
    return name(value) if name and isinstance(value, int) and value >= 0 else value


def _numbered(rows: Iterable[Row]) -> list[tuple[int, Row]]:
    """pandas writes a missing value as a NaN."""
    return [
        (number, {k: None if isinstance(v, float) and isnan(v) else v for k, v in row.items()})
        for number, row in enumerate(rows, start=1)
    ]


def _needed(module: str, what: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{what} needs what candor[data] installs: {error}") from error


def kind_of(value: Any) -> str:
    """A value's kind in words for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value in ("", [], {}):
        return "an empty one"
    return names.get(type(value), "a number")
