"""Bundles of formats 1 to 3, written as they were, load as what they meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from candor.model_store.bundle import load_bundle
from candor.model_store.errors import ManifestError
from candor.model_store.formats import identifies_as_before, knows_turns
from candor.model_store.manifest import EXEMPLARS, MANIFEST, SEAL, FileEntry, seal
from candor.policy.conversation import Conversations, SystemPrompt, Turn, shown

ASK: Turn = {"role": "user", "content": "ask"}
BRIEF: Turn = {"role": "system", "content": "Be brief."}


def older(
    files: dict[str, bytes], version: int, system_prompt: str | None, prompts: list[list[Turn]]
) -> dict[str, bytes]:
    """The bundle's files in that format, its exemplars with these conversations in turn."""
    lines = [json.loads(line) for line in files[EXEMPLARS].splitlines()]
    for number, line in enumerate(lines):
        del line["messages"]
        line["prompt"] = shown(prompts[number % len(prompts)])
    exemplars = "".join(json.dumps(line) + "\n" for line in lines).encode()
    manifest: dict[str, Any] = json.loads(files[MANIFEST])
    manifest["format_version"] = version
    del manifest["rule"], manifest["cascade"]
    del manifest["policy"]["conversations"], manifest["model"]["engine_options"]
    manifest["policy"]["system_prompt"] = system_prompt
    if version < 3:
        del manifest["passed_over"]
    if version < 2:
        del manifest["certificates"], manifest["policy"]["resample"]
    entry = FileEntry.of(exemplars)
    manifest["files"][EXEMPLARS] = {"sha256": entry.sha256, "size": entry.size}
    written = json.dumps(manifest).encode()
    return {**files, EXEMPLARS: exemplars, MANIFEST: written, SEAL: seal(written)}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("system_prompt", "prompts", "expected"),
    [
        (None, [[ASK]], Conversations(SystemPrompt(), ("user",))),
        ("Be brief.", [[ASK]], Conversations(SystemPrompt.fixed("Be brief."), ("user",))),
        (None, [[BRIEF, ASK]], Conversations.of_records([[BRIEF, ASK]])),
        (None, [[ASK], [BRIEF, ASK]], Conversations.of_records([[ASK], [BRIEF, ASK]])),
        (
            None,
            [[ASK], [ASK, {"role": "assistant", "content": "ok"}, ASK]],
            Conversations(SystemPrompt(), ("user", "user assistant user")),
        ),
    ],
)
def test_null_means_what_the_exemplars_say(
    files: dict[str, bytes],
    write: Callable[[Path, dict[str, bytes]], Path],
    tmp_path: Path,
    version: int,
    system_prompt: str | None,
    prompts: list[list[Turn]],
    expected: Conversations,
) -> None:
    bundle = load_bundle(write(tmp_path / "old", older(files, version, system_prompt, prompts)))
    assert bundle.manifest.format_version == version
    assert bundle.manifest.policy.conversations == expected
    assert list(bundle.exemplars[0].messages) == prompts[0]
    assert bundle.exemplars[0].prompt == shown(prompts[0])


def test_which_formats_know_turns_and_the_latest_identity() -> None:
    assert [knows_turns(version) for version in range(1, 8)] == [False] * 3 + [True] * 4
    assert [identifies_as_before(version) for version in range(1, 8)] == [True] * 3 + [False] * 4


def test_format_5_has_no_cascade(
    files: dict[str, bytes], write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    manifest: dict[str, Any] = json.loads(files[MANIFEST]) | {"format_version": 5}
    written = json.dumps(manifest).encode()
    with pytest.raises(ManifestError, match="cascade: expected no such field"):
        load_bundle(write(tmp_path / "named", {**files, MANIFEST: written, SEAL: seal(written)}))
    assert manifest.pop("cascade") is None
    written = json.dumps(manifest).encode()
    old = load_bundle(write(tmp_path / "old", {**files, MANIFEST: written, SEAL: seal(written)}))
    assert replace(old.manifest, format_version=7) == load_bundle(write(tmp_path / "new", files)).manifest


def test_format_4_is_the_latest_without_a_rule(
    files: dict[str, bytes], write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    manifest: dict[str, Any] = json.loads(files[MANIFEST]) | {"format_version": 4}
    assert (manifest.pop("rule"), manifest.pop("cascade")) == (None, None)
    written = json.dumps(manifest).encode()
    old = load_bundle(write(tmp_path / "old", {**files, MANIFEST: written, SEAL: seal(written)}))
    new = load_bundle(write(tmp_path / "new", files))
    assert old.rule is None
    assert replace(old.manifest, format_version=7) == new.manifest
