"""Strict JSON, in which a text has only one meaning, and decoding of JSON objects to frozen dataclasses.

Python's parser accepts NaN, Infinity and 1e999, and keeps the last of two equal keys, so that two
readers of one file may see different values. Here all of these are errors. Numbers are written in
the shortest form that reads back to the same float64.

`decode` follows the type hints of a dataclass: the file must have each field, no others, and each must have
its type. A default in the dataclass does not make a field optional in the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from candor.model_store.errors import Difference

_INT64 = range(-(2**63), 2**63)


def parse(data: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8. Raises ValueError, which says what is wrong with it."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_int64,
        )
        # An escaped lone surrogate parses, but UTF-8 cannot encode it for a client.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def dump(value: Any, *, indent: int | None = None) -> bytes:
    """Returns the JSON text of a value in UTF-8, with keys in their order. Raises ValueError or TypeError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).encode("utf-8")


def decode(kind: Any, value: Any, where: str, faults: list[Difference]) -> Any:
    """Returns `value` as the type `kind`. For a value that does not fit, it adds to `faults` and returns None.

    kind: str, int, float, bool, Any, a Literal of strings, a dataclass, or tuple[T, ...],
    dict[str, T] or T | None of these. where: the value's name in messages, "" for the whole.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_object(kind, value, where, faults)
    if origin is UnionType:
        inner = [one for one in arguments if one is not NoneType]
        return None if value is None else decode(inner[0], value, where, faults)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], one, f"{where}[{i}]", faults) for i, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], one, _join(where, key), faults) for key, one in value.items()}
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if kind is float and type(value) is int:  # JSON has one type of number
        return float(value)
    if type(value) is kind:  # not isinstance, since True must not count as a number
        return value
    faults.append(Difference(where or "it", _name(kind), show(value)))
    return None


def show(value: Any) -> str:
    """Returns a value as JSON for a message, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _decode_object(kind: Any, value: dict[str, Any], where: str, faults: list[Difference]) -> Any:
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    before = len(faults)
    faults += [
        Difference(_join(where, key), "no such field", show(value[key])) for key in value.keys() - known
    ]
    faults += [
        Difference(_join(where, key), _name(hints[key]), "nothing") for key in known if key not in value
    ]
    decoded = {
        key: decode(hints[key], value[key], _join(where, key), faults) for key in known if key in value
    }
    if len(faults) > before:
        return None
    try:
        return kind(**decoded)
    except ValueError as error:
        faults.append(Difference(where or "it", f"a valid {kind.__name__}", str(error)))
        return None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _name(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(_name(one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(json.dumps(one) for one in get_args(kind))
    if is_dataclass(kind) or get_origin(kind) is dict:
        return "an object"
    if get_origin(kind) is tuple:
        return "a list"
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    return words.get(kind, "a value")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys that stand twice in one object: {', '.join(map(show, twice))}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} does not fit a float64")
    return number


def _int64(text: str) -> int:
    # Checks the length first: Python refuses int() of very many digits with a message of its own.
    if len(text) > 20 or int(text) not in _INT64:
        raise ValueError(f"the integer {text[:24]} does not fit 64 bits")
    return int(text)
