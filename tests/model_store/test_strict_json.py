"""One text, one meaning: what Python's own parser lets pass is refused, and types are exact."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candor.model_store import strict_json
from candor.model_store.errors import Difference


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e999", "1e999 does not fit"),
        (b"-1e999", "-1e999 does not fit"),
        (b"9223372036854775808", "does not fit 64 bits"),
        (b"9" * 5000, "does not fit 64 bits"),
        (b'{"a": 1, "b": 2, "a": 1}', 'stand twice in one object: "a"'),
        (b'[{"x": {"k": 0, "k": 0}}]', 'stand twice in one object: "k"'),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff", "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
    ],
)
def test_refused(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        strict_json.parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, {"a": [float("-inf")]}, "\ud800"])
def test_not_written(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        strict_json.dump(value)


def test_the_largest_integers_and_plain_values_pass() -> None:
    assert strict_json.parse(b"[-9223372036854775808, 9223372036854775807, 0.5, null, true]") == [
        -(2**63),
        2**63 - 1,
        0.5,
        None,
        True,
    ]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_to_the_bit(number: float) -> None:
    back = strict_json.parse(strict_json.dump(number))
    assert struct.pack("<d", back) == struct.pack("<d", number)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


@given(json_values)
def test_any_value_comes_back(value: Any) -> None:
    assert strict_json.parse(strict_json.dump(value)) == value


@given(st.binary())
def test_arbitrary_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = strict_json.parse(data)
    except ValueError:
        return
    assert json.loads(data) == value


@dataclass(frozen=True)
class Inner:
    n: int
    x: float = 1.0


@dataclass(frozen=True)
class Outer:
    names: tuple[str, ...]
    mode: Literal["a", "b"]
    inner: Inner | None
    table: dict[str, Inner]
    free: Any

    def __post_init__(self) -> None:
        if "bad" in self.names:
            raise ValueError("no name may be bad")


def _sound() -> dict[str, Any]:
    return {
        "names": ["p"],
        "mode": "a",
        "inner": {"n": 1, "x": 2},
        "table": {"k": {"n": 2, "x": 0.5}},
        "free": [1],
    }


def test_decoded_as_declared() -> None:
    faults: list[Difference] = []
    decoded = strict_json.decode(Outer, _sound(), "", faults)
    assert faults == []
    assert decoded == Outer(("p",), "a", Inner(1, 2.0), {"k": Inner(2, 0.5)}, [1])
    assert type(decoded.inner.x) is float
    assert strict_json.decode(Outer, {**_sound(), "inner": None}, "", faults).inner is None


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"names": "p"}, Difference("names", "a list", '"p"')),
        ({"names": ["p", 1]}, Difference("names[1]", "a string", "1")),
        ({"mode": "c"}, Difference("mode", 'one of "a", "b"', '"c"')),
        ({"mode": 0}, Difference("mode", 'one of "a", "b"', "0")),
        ({"inner": {"n": True, "x": 1}}, Difference("inner.n", "an integer", "true")),
        ({"inner": {"n": 1.0, "x": 1}}, Difference("inner.n", "an integer", "1.0")),
        ({"inner": {"n": 1, "x": "1"}}, Difference("inner.x", "a number", '"1"')),
        ({"inner": {"n": 1, "x": False}}, Difference("inner.x", "a number", "false")),
        ({"inner": []}, Difference("inner", "an object", "[]")),
        ({"inner": {"n": 1}}, Difference("inner.x", "a number", "nothing")),  # its default counts for nothing
        ({"inner": {"n": 1, "x": 1, "y": 2}}, Difference("inner.y", "no such field", "2")),
        ({"table": {"k": None}}, Difference("table.k", "an object", "null")),
        ({"table": None}, Difference("table", "an object", "null")),
        ({"names": ["bad"]}, Difference("it", "a valid Outer", "no name may be bad")),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], fault: Difference) -> None:
    faults: list[Difference] = []
    strict_json.decode(Outer, {**_sound(), **changed}, "", faults)
    assert faults == [fault]


def test_all_faults_at_once() -> None:
    faults: list[Difference] = []
    strict_json.decode(Outer, {"names": [1, 2], "mode": "a", "table": {"k": {}}, "more": 0}, "", faults)
    assert {fault.where for fault in faults} == {
        "names[0]",
        "names[1]",
        "inner",
        "table.k.n",
        "table.k.x",
        "free",
        "more",
    }


@given(json_values)
def test_any_value_is_decoded_or_a_fault(value: Any) -> None:
    faults: list[Difference] = []
    decoded = strict_json.decode(Outer, value, "", faults)
    assert (decoded is None) == bool(faults)
