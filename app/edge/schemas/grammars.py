"""Bounds on what a request asks to have compiled to a grammar: a JSON schema, a regular expression, a grammar.

Compiling takes time that grows with what they stand for, not with their length: `.{1,999}x.{1,999}` is short. So a
pattern is measured as it would be written without counts, and a schema's own counts are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candor.engine.base import RequestRefused

MOST_VALUES = 10_000
MOST_CHOICES = 1_000
MOST_TEXT = 16_384
MOST_WRITTEN_OUT = 5_000
MOST_LENGTH = 10_000
MOST_ITEMS = 1_000

_FIELDS = ("structured_outputs", "response_format", "tools", "text", "output_config")
"""Fields of a request, in any of the forms, that hold what is compiled."""

_PATTERNS = ("pattern", "regex")
_TEXTS = (*_PATTERNS, "grammar", "structural_tag", "lark", "definition")
_LENGTHS = {"minLength": MOST_LENGTH, "maxLength": MOST_LENGTH} | dict.fromkeys(
    ("minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"), MOST_ITEMS
)


def check(body: Mapping[str, Any]) -> None:
    """Raises RequestRefused, with the place, for what would take too long to compile."""
    for name in _FIELDS:
        if isinstance(body.get(name), dict | list):
            _check_field(name, body[name])


def _check_field(name: str, field: Any) -> None:
    values = characters = written = 0
    rest: list[tuple[str, Any]] = [(name, field)]
    while rest:
        where, value = rest.pop()
        values += 1
        if values > MOST_VALUES:
            _refuse(name, f"at most {MOST_VALUES} values")
        if isinstance(value, list):
            if where == "choice" and len(value) > MOST_CHOICES:
                _refuse(name, f"at most {MOST_CHOICES} choices, got {len(value)}")
            rest += [(where, one) for one in value]
        elif isinstance(value, dict):
            rest += value.items()
            patterns = value.get("patternProperties")
            rest += [("pattern", one) for one in patterns] if isinstance(patterns, dict) else []
        elif isinstance(value, str) and where in _TEXTS:
            characters += len(value)
            if characters > MOST_TEXT:
                _refuse(name, f"patterns and grammars of at most {MOST_TEXT} characters together")
            written += max(0, written_out(value) - (0 if where in _PATTERNS else len(value)))
            if written > MOST_WRITTEN_OUT:
                _refuse(
                    name, f"patterns of at most {MOST_WRITTEN_OUT} characters with repetitions written out"
                )
        elif isinstance(value, int | float) and value > _LENGTHS.get(where, value):
            _refuse(name, f"{where} of at most {_LENGTHS[where]}, got {value}")


def _refuse(field: str, expected: str) -> None:
    raise RequestRefused(
        f"{field}: expected {expected}; it would take too long to compile", 400, field, "too_large"
    )


def written_out(pattern: str) -> int:
    """Returns how many characters a pattern matches at most one after the other, its `*` and `+` counted once.

    `(ab|c{3}){2,4}` has 20: four times a, b and three c. An alternative counts beside the others.
    """
    outer: list[int] = []
    total = last = at = 0
    while at < len(pattern):
        one = pattern[at]
        at += 1
        if one == "(":
            outer.append(total)
            total = last = 0
            continue
        if one == ")" and outer:
            last = total
            total += outer.pop()
            continue
        if one == "{":
            count, end = _count(pattern, at)
            if count is not None:
                total += last * (max(count, 1) - 1)
                last *= max(count, 1)
                at = end
                continue
        elif one in "*+?|^$":
            continue
        elif one == "\\":
            at += 1
        elif one == "[":
            while at < len(pattern) and pattern[at] != "]":
                at += 2 if pattern[at] == "\\" else 1
            at += 1
        last = 1
        total += 1
    return total + sum(outer)


def _count(pattern: str, at: int) -> tuple[int | None, int]:
    """Returns the larger number of `m,n}` at this place and where it ends; None for no count."""
    end = pattern.find("}", at, at + 24)
    numbers = pattern[at:end].replace(" ", "").split(",") if end > 0 else [""]
    if len(numbers) > 2 or not all(
        number.isascii() and (number.isdigit() or not number) for number in numbers
    ):
        return None, at
    found = [int(number) for number in numbers if number]
    return (max(found), end + 1) if found else (None, at)
