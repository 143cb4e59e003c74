"""Bounds on the number of things in a body. Each wrong one would be reported, so the number is looked at first."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_MOST_FIELDS = 100
_MOST_VALUES = 1000


class FewFields(BaseModel):
    """A model that refuses unknown fields, and more than 100 fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _are_few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise PydanticCustomError("fields", "expected at most {most} fields", {"most": _MOST_FIELDS})
        return value


def few_values(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the value if it holds at most 1,000 values, however deep."""
    left, rest = _MOST_VALUES, [value]
    while rest:
        one = rest.pop()
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        left -= len(inner)
        if left < 0:
            raise PydanticCustomError("values", "expected at most {most} values", {"most": _MOST_VALUES})
        rest += inner
    return value
