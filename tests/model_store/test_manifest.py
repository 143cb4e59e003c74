"""The manifest survives its way to bytes and back, and nothing that is not one gets in."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from candor.engine.base import ModelIdentity
from candor.model_store.errors import ManifestError
from candor.model_store.manifest import (
    LIMITS,
    LISTED,
    MANIFEST,
    REPORT,
    SEAL,
    FileEntry,
    Manifest,
    seal,
)
from candor.policy.cascade import CascadeTerms
from candor.policy.certificate import Certificate
from candor.policy.conversation import SystemPrompt
from candor.policy.policy import Policy

Files = dict[str, bytes]


AT_0_9 = Certificate(0.9, "lower", 0.95, 0.95, 2.0, 400, 120, 119, 0.961)


def _paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of the manifest at every depth, except what provenance holds."""
    found: list[tuple[str, ...]] = []
    if isinstance(value, dict) and prefix != ("provenance",):
        for key, inner in value.items():
            found += [(*prefix, key), *_paths(inner, (*prefix, key))]
    return found


@pytest.fixture
def fields(files: Files) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(files[MANIFEST])
    return parsed


def _parse(fields: dict[str, Any]) -> Manifest:
    return Manifest.from_bytes(json.dumps(fields).encode())


def test_round_trip(files: Files, manifest: Manifest) -> None:
    back = Manifest.from_bytes(files[MANIFEST])
    entries = {name: FileEntry(hashlib.sha256(files[name]).hexdigest(), len(files[name])) for name in LISTED}
    assert back == replace(manifest, files=entries)
    assert back.to_bytes() == files[MANIFEST]


def test_without_an_adapter(manifest: Manifest) -> None:
    entry = FileEntry("0" * 64, 1)
    bare = replace(manifest, adapter=None, files=dict.fromkeys(LISTED, entry))
    assert Manifest.from_bytes(bare.to_bytes()) == bare


def test_every_missing_field_is_named(fields: dict[str, Any]) -> None:
    paths = _paths(fields)
    assert len(paths) > 30  # thirteen fields, half of them objects
    for path in paths:
        changed = json.loads(json.dumps(fields))
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        with pytest.raises(ManifestError) as caught:
            _parse(changed)
        # A missing file is a wrong set of names; all others are named themselves.
        expected = "files" if path[0] == "files" and len(path) == 2 else ".".join(path)
        assert [one.where for one in caught.value.differences] == [expected]


def test_unknown_fields_are_named_all_at_once(fields: dict[str, Any]) -> None:
    fields["colour"] = "red"
    fields["model"]["quantised"] = True
    with pytest.raises(ManifestError) as caught:
        _parse(fields)
    assert {one.where for one in caught.value.differences} == {"colour", "model.quantised"}
    assert 'colour: expected no such field, got "red"' in str(caught.value)


def test_another_format_is_said_before_its_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="format_version: expected 1 to 7, got 8") as caught:
        _parse({"format_version": 8, "quite": "different"})
    assert len(caught.value.differences) == 1
    assert "version of candor" in caught.value.remedy
    with pytest.raises(ManifestError, match="format_version: expected an integer, got true"):
        _parse({**fields, "format_version": True})


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{", b'{"a":1,"a":2}', b"\xff\xfe", b'{"alphas":[NaN]}']
)
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "path",
    ["../report.json", "/etc/passwd", "sub/report.json", "./report.json", "..", "report.json\0", MANIFEST],
)
def test_a_path_that_leaves_the_directory(fields: dict[str, Any], path: str) -> None:
    fields["files"][path] = fields["files"].pop(REPORT)
    with pytest.raises(ManifestError) as caught:
        _parse(fields)
    (difference,) = caught.value.differences
    assert difference.where == "files"
    assert REPORT in difference.expected
    assert json.dumps(path)[1:-1] in difference.actual


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"sha256": "A" * 64, "size": 1}, f"files.{REPORT}.sha256"),
        ({"sha256": "a" * 63, "size": 1}, f"files.{REPORT}.sha256"),
        ({"sha256": "a" * 64 + "\n", "size": 1}, f"files.{REPORT}.sha256"),
        ({"sha256": "a" * 64, "size": -1}, f"files.{REPORT}.size"),
        ({"sha256": "a" * 64, "size": LIMITS[REPORT] + 1}, f"files.{REPORT}.size"),
    ],
)
def test_entries(fields: dict[str, Any], entry: dict[str, Any], where: str) -> None:
    fields["files"][REPORT] = entry
    with pytest.raises(ManifestError) as caught:
        _parse(fields)
    assert [one.where for one in caught.value.differences] == [where]


def test_a_file_may_be_empty_or_as_large_as_its_limit(fields: dict[str, Any]) -> None:
    for size in (0, LIMITS[REPORT]):
        fields["files"][REPORT]["size"] = size
        assert _parse(fields).files[REPORT].size == size


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"name": " "}, "name"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-01-31T12:00:00"}, "created"),  # of no zone
        ({"created": "2026-01-31T12:00:00+02:00"}, "created"),
        ({"alphas": ()}, "alphas"),
        ({"alphas": (0.95, 0.9)}, "alphas"),
        ({"alphas": (0.9, 0.9)}, "alphas"),
        ({"alphas": (0.5,)}, "alphas"),
        ({"alphas": (1.01,)}, "alphas"),
        ({"class_names": ("one",)}, "class_names"),
        ({"class_names": ("one", "one")}, "class_names"),
        ({"class_names": ("one", "")}, "class_names"),
        ({"format_version": 8}, "format_version"),
        ({"passed_over": -1}, "passed_over"),
        ({"format_version": 0}, "format_version"),
        ({"certificates": (AT_0_9, AT_0_9)}, "certificates"),
        ({"alphas": (0.8, 0.95), "certificates": (AT_0_9,)}, "certificates"),  # of no region
        ({"cascade": CascadeTerms("big", 64, None, None)}, "cascade.certificates"),  # of no rule
        ({"model": ModelIdentity("m", "M", 0, "float32", "", "", "", "")}, "model.hidden_size"),
    ],
)
def test_ranges(manifest: Manifest, changed: dict[str, Any], where: str) -> None:
    with pytest.raises(ManifestError) as caught:
        replace(manifest, **({"certificates": ()} | changed))
    assert [one.where for one in caught.value.differences] == [where]


@pytest.mark.parametrize(
    "wrong",
    [
        (-0.1, 1.0, 0, 1),
        (2.1, 1.0, 0, 1),
        (0.0, 0.0, 0, 1),
        (0.0, 1.1, 0, 1),
        (0.0, 1.0, -1, 1),
        (0.0, 1.0, 0, 0),
    ],
)
def test_policy_ranges(fields: dict[str, Any], wrong: tuple[float, float, int, int]) -> None:
    with pytest.raises(ValueError, match="temperature must be in"):
        Policy(*wrong)
    names = ("temperature", "top_p", "top_k", "max_tokens")
    fields["policy"].update(zip(names, wrong, strict=True))
    with pytest.raises(ManifestError, match="policy: expected a valid Policy"):
        _parse(fields)


@pytest.mark.parametrize(("temperature", "resample"), [(0.0, 2), (0.7, 0), (0.7, -1)])
def test_resampling_needs_answers_that_differ(temperature: float, resample: int) -> None:
    with pytest.raises(ValueError, match=f"got resample {resample}, temperature {temperature}"):
        Policy(temperature, 1.0, 0, 16, resample)
    assert Policy(0.7, 1.0, 0, 16, 2).resample == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"accuracy": 1.0}, "accuracy must be in"),
        ({"confidence": 0.4}, "confidence in"),
        ({"rescaled_similarity_min": 0.5}, "at least 1"),
        ({"rescaled_similarity_min": float("inf")}, "at least 1"),
        ({"right": 121}, "right <= answered"),
        ({"answered": 401}, "answered <= records"),
        ({"right": 0, "answered": 0}, "0 < right"),
        ({"lower_bound": 0.94}, "does not show an accuracy of 0.95"),
    ],
)
def test_a_certificate_that_its_own_counts_do_not_bear_out(
    fields: dict[str, Any], wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        replace(AT_0_9, **wrong)
    fields["certificates"][0].update(wrong)
    if "inf" not in map(str, wrong.values()):
        with pytest.raises(ManifestError, match=r"certificates\[0\]: expected a valid Certificate"):
            _parse(fields)


def test_a_certificate_covers_from_its_threshold_on() -> None:
    assert [AT_0_9.covers(q_prime) for q_prime in (1.999, 2.0, 400.0)] == [False, True, True]


def _older(fields: dict[str, Any], version: int, system_prompt: str | None = "Be brief.") -> dict[str, Any]:
    """The manifest as that version would have written it."""
    policy = {name: value for name, value in fields["policy"].items() if name != "conversations"}
    old = fields | {"format_version": version, "policy": policy | {"system_prompt": system_prompt}}
    del old["rule"], old["cascade"]
    old["model"] = {name: value for name, value in old["model"].items() if name != "engine_options"}
    if version < 3:
        del old["passed_over"]
    if version < 2:
        del old["certificates"], old["policy"]["resample"]
    return old


@pytest.mark.parametrize("version", [1, 2, 3])
class TestOlderVersions:
    def test_they_are_read_as_what_they_meant(self, fields: dict[str, Any], version: int) -> None:
        read = _parse(_older(fields, version))
        assert read.format_version == version
        assert read.name == fields["name"]
        assert read.passed_over == (0 if version < 3 else fields["passed_over"])
        assert read.policy.resample == 1
        assert bool(read.certificates) is (version > 1)
        assert read.policy.conversations.system_prompt == SystemPrompt.fixed("Be brief.")

    def test_until_the_exemplars_have_told_no_conversation_is_calibrated(
        self, fields: dict[str, Any], version: int
    ) -> None:
        policy = _parse(_older(fields, version, None)).policy
        assert policy.conversations.resolve([{"role": "user", "content": "ask"}]).departure is not None

    def test_what_they_lack_besides_is_still_missing(self, fields: dict[str, Any], version: int) -> None:
        old = _older(fields, version)
        del old["policy"]["top_p"], old["policy"]["system_prompt"], old["name"]
        with pytest.raises(ManifestError) as caught:
            _parse(old)
        found = {one.where for one in caught.value.differences}
        assert found == {"policy.top_p", "policy.system_prompt", "name"}
        with pytest.raises(ManifestError, match="policy: expected an object, got nothing"):
            _parse({key: value for key, value in old.items() if key != "policy"} | {"name": "n"})

    def test_fields_of_later_versions_are_none_of_theirs(self, fields: dict[str, Any], version: int) -> None:
        old = _older(fields, version)
        old["policy"]["conversations"] = fields["policy"]["conversations"]
        wrong = {"policy.conversations"}
        if version < 3:
            old["passed_over"] = 3
            wrong.add("passed_over")
        if version < 2:
            old["certificates"], old["policy"]["resample"] = [], 1
            wrong |= {"certificates", "policy.resample"}
        with pytest.raises(ManifestError) as caught:
            _parse(old)
        assert {one.where for one in caught.value.differences} == wrong

    def test_a_system_prompt_that_is_no_text(self, fields: dict[str, Any], version: int) -> None:
        with pytest.raises(ManifestError, match=r"policy\.system_prompt: expected a string, got 3"):
            _parse(_older(fields, version, 3))  # type: ignore[arg-type]


def test_the_latest_version_has_no_fields_of_older_ones(fields: dict[str, Any]) -> None:
    fields["policy"]["system_prompt"] = None
    with pytest.raises(ManifestError, match=r"policy\.system_prompt: expected no such field"):
        _parse(fields)


def test_an_unknown_evidence_is_refused(fields: dict[str, Any]) -> None:
    fields["representation"]["evidence"] = ["mood"]
    with pytest.raises(ManifestError, match=r"representation: .*unknown evidence \['mood'\]"):
        _parse(fields)


def test_provenance_must_be_json(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match="Write null"):
        replace(manifest, provenance={"rate": float("nan")}).to_bytes()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_seal_is_what_sha256sum_checks(
    tmp_path: Path, files: Files, write: Callable[[Path, Files], Path]
) -> None:
    folder = write(tmp_path / "b", files)
    command = ["sha256sum", "--strict", "-c", SEAL]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    (folder / MANIFEST).write_bytes(files[MANIFEST] + b" ")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_the_seal_of_known_bytes() -> None:
    # SHA-256 of the empty string, FIPS 180-4's well-known value.
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert seal(b"") == f"{empty}  manifest.json\n".encode()
