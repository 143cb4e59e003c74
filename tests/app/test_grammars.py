"""What takes long to compile is known from its counts, however short it is; what people write is let through."""

from __future__ import annotations

from typing import Any

import pytest

from candor.app.edge.schemas.grammars import check, written_out
from candor.engine.base import RequestRefused


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": inner}}}


@pytest.mark.parametrize(
    ("pattern", "characters"),
    [
        ("", 0),
        ("abc", 3),
        ("(ab|c{3}){2,4}", 20),
        (r"\{\d{2,}\}", 4),
        ("[a-z\\]{9}]{3}x", 4),
        ("a{,5}b?", 6),
        ("((a{10}){10}){10}", 1000),
        ("x{a}", 4),
        ("(((", 0),
        (")){3}a", 5),
        ("a{99999999999999999999}", 10**20 - 1),
        ("a{1,2,3}", 8),
        ("^(\\d{3}-){2}\\d{4}$", 12),
    ],
)
def test_a_pattern_is_measured_without_counts(pattern: str, characters: int) -> None:
    assert written_out(pattern) == characters


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": ".{1,3000}x.{1,3000}"}},
        {"structured_outputs": {"choice": ["a"] * 1001}},
        {"structured_outputs": {"grammar": "root ::= " + '"a" ' * 5000}},
        {"structured_outputs": {"grammar": 'root ::= ("a"{100}){100}'}},
        schema({"type": "string", "pattern": "((a{50}){50}){50}"}),
        schema({"type": "object", "properties": {str(n): {"pattern": "(a{9}){99}"} for n in range(9)}}),
        schema({"type": "string", "maxLength": 1_000_000}),
        schema({"type": "array", "minItems": 100_000}),
        schema({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(9_000)}}),
        schema({"patternProperties": {"(a{99}){99}": {"type": "string"}}}),
        {"tools": [{"type": "function", "function": {"parameters": {"maxItems": 10**9}}}]},
        {"tools": [{"name": "a", "input_schema": {"pattern": "(.{100}){100}"}}]},
        {"text": {"format": {"type": "json_schema", "schema": {"minLength": 1e300}}}},
    ],
)
def test_what_would_take_long_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused, match="it would take too long to compile") as refused:
        check(body)
    assert (refused.value.status, refused.value.param) == (400, next(iter(body)))


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": r"(\d{1,3}\.){3}\d{1,3}"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"grammar": 'root ::= "{" pair "}"\n' * 500}},
        schema({"type": "string", "maxLength": 4000, "pattern": "^[^@]+@[^@]+$"}),
        schema(
            {"type": "object", "properties": {"pattern": {"type": "string"}, "maxItems": {"const": 10**6}}}
        ),
        {"tools": [{"type": "function", "function": {"name": "f", "description": "{" * 50_000}}] * 60},
        {"text": "a plain text", "response_format": None},
        {"messages": [{"pattern": "(a{99}){99}{99}"}]},
    ],
)
def test_what_people_write_is_let_through(body: dict[str, Any]) -> None:
    check(body)
