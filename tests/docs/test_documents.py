"""What the documents name exists: links, files, tests, modules, make targets, commands, options and variables."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from typer.main import get_command

from candor.app.cli import cli
from candor.app.process.settings import Settings
from candor.engine.vllm_options import FRONTEND

ROOT = Path(__file__).resolve().parents[2]
LOG = "docs/log.md"
"""Dated entries: what they name need not stand any more."""

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "demo/README.md", "docker/README.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
ROOMS = "|".join(
    {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"docker", "docs", "requirements", "tests"}
)
FILE = re.compile(rf"(?<![\w./-])(?:{ROOMS})/[\w./-]*\w")
COMMAND = get_command(cli)

document = pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != LOG])


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def lines(document: str) -> list[str]:
    """Those of its code blocks; what a backslash continues is one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def spans(document: str) -> list[str]:
    """What stands in backticks within the text."""
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def code(document: str) -> str:
    return "\n".join(lines(document) + spans(document))


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(document)):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document} links to {target}"


@document
def test_files_exist(document: str) -> None:
    for name in FILE.findall(code(document)):
        assert (ROOT / name).exists(), f"{document} names {name}"


@document
def test_tests_exist(document: str) -> None:
    files = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")}
    names = {path.name for path in files}
    for name in re.findall(r"\btest_\w+(?:\.py)?\b", code(document)):
        found = (
            name in names if name.endswith(".py") else any(f"def {name}(" in one for one in files.values())
        )
        assert found, f"{document} names {name}"


@document
def test_modules_and_what_is_in_them_exist(document: str) -> None:
    text = code(document)
    for name in re.findall(r"(?:python|accelerate launch .*) -m ([a-z_][\w.]*)", text):
        assert find_spec(name) is not None, f"{document} runs {name}"
    for name in re.findall(r"(?<![\w/.-])candor(?:\.\w+)+", text):
        assert resolve_name(name) is not None, f"{document} names {name}"


@document
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in re.findall(r"^make ([\w-]+)", code(document), re.MULTILINE):
        assert name in targets, f"{document} says make {name}"


@document
def test_commands_can_be_typed(document: str) -> None:
    """Whole ones, with all that they need; those with an ellipsis and those in the text, as far as they go."""
    for line in lines(document):
        words = shlex.split(line, comments=True) if line.startswith("candor ") else []
        if words and "..." not in words:
            command, rest = command_of(words[1:])
            command.make_context(command.name, rest)  # raises click's UsageError
    for line in lines(document) + spans(document):
        if re.match(r"candor [a-z]", line):
            known = options(line.split()[1:])
            for option in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", line):
                assert option in known, f"{document}: {line}"


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and the rest of them."""
    command: Any = COMMAND
    while inner := getattr(command, "commands", None):
        word, *words = words
        assert word in inner, f"candor has no command {word}"
        command = inner[word]
    return command, words


def options(words: list[str]) -> set[str]:
    command, _ = command_of(words)
    own = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    return own | vllms_options() if command.context_settings.get("ignore_unknown_options") else own


@cache
def vllms_options() -> set[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = FRONTEND | AsyncEngineArgs.__dataclass_fields__.keys()
    return {f"--{name.replace('_', '-')}" for name in names} | {"--config"}


@document
def test_options_exist(document: str) -> None:
    """Those named by themselves: some command has them."""
    every = set().union(*(options(words) for words in every_command()))
    for span in spans(document):
        if span.startswith("--"):
            assert span.split()[0].partition("=")[0] in every, f"{document} names {span}"


def every_command(command: Any = COMMAND, words: tuple[str, ...] = ()) -> list[list[str]]:
    inner = getattr(command, "commands", None)
    if not inner:
        return [list(words)]
    return [one for name in inner for one in every_command(inner[name], (*words, name))]


@document
def test_variables_are_read(document: str) -> None:
    known = {f"CANDOR_{name.upper()}" for name in Settings.model_fields}
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in (*ROOT.glob("app/**/*.py"), *ROOT.glob("calibration/*.py"), *ROOT.glob("engine/*.py"))
    )
    for name in re.findall(r"\bCANDOR_[A-Z_]*[A-Z]\b", text_of(document)):
        assert name in known or f'"{name}"' in source, f"{document} names {name}"


@document
def test_lines_are_short(document: str) -> None:
    """Tables and what is to be copied aside."""
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        assert len(line) < 120 or line.startswith("|"), f"{document}: {line}"
