"""What is asked of the model is made in the policy layer, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import candor

ROOMS = Path(candor.__file__).parent
MADE_BY_POLICY = {"Sampling", "encode_chat", "encode_endings"}
"""A way to draw, and the ids of a conversation and of questions."""

ITSELF = {"policy", "engine"}
PROBE = ("app/answering/waiting.py", "Sampling")
"""The one token that a silent engine is asked for is no answer."""


def calls(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {one.id for one in called if isinstance(one, ast.Name)}
    return (names | {one.attr for one in called if isinstance(one, ast.Attribute)}) & MADE_BY_POLICY


def test_turns_and_sampling_are_made_once() -> None:
    found = {}
    for room in sorted(one for one in ROOMS.iterdir() if one.is_dir() and one.name not in ITSELF):
        for file in room.rglob("*.py"):
            if made := calls(file):
                found[str(file.relative_to(ROOMS))] = made
    assert found == {PROBE[0]: {PROBE[1]}}


def test_system_turns_are_put_in_once() -> None:
    """A dictionary with the role "system" is written down in the policy layer alone."""
    written = [
        str(file.relative_to(ROOMS))
        for file in ROOMS.rglob("*.py")
        if '"role": "system"' in file.read_text(encoding="utf-8")
    ]
    assert written == []
