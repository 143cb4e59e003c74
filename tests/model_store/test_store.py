"""Bundles are published whole or not at all, and found by path, name or digest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from candor.model_store.bundle import Exemplar, load_bundle
from candor.model_store.errors import BundleExists, BundleNotFound, ContentError
from candor.model_store.manifest import MANIFEST, NAMES, REPORT, FileEntry, Manifest
from candor.model_store.store import list_bundles, publish, resolve
from candor.sdm.estimator import SDMEstimator

Publish = Callable[..., str]


@pytest.fixture
def put(manifest: Manifest, estimator: SDMEstimator, exemplars: tuple[Exemplar, ...]) -> Publish:
    """Publishes the sound bundle under a name."""

    def put(path: Path, name: str = "demo", **options: Any) -> str:
        return publish(path, replace(manifest, name=name), estimator, exemplars, {"n": 1}, **options)

    return put


def _bytes(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_published_and_loaded(tmp_path: Path, put: Publish) -> None:
    digest = put(tmp_path / "deep" / "er" / "demo")
    bundle = load_bundle(tmp_path / "deep" / "er" / "demo")
    assert bundle.digest == digest == FileEntry.of((tmp_path / "deep/er/demo" / MANIFEST).read_bytes()).sha256
    assert {one.name for one in (tmp_path / "deep" / "er" / "demo").iterdir()} == NAMES
    assert os.listdir(tmp_path / "deep" / "er") == ["demo"]


def test_no_handle_stays_open(tmp_path: Path, put: Publish) -> None:
    put(tmp_path / "demo")
    before = os.listdir("/proc/self/fd")
    put(tmp_path / "deep" / "demo")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_bundle_that_is_taken_away_meanwhile_is_no_fault_of_the_file_system(
    tmp_path: Path, put: Publish
) -> None:
    put(tmp_path / "demo")

    def take_away(step: str) -> None:
        if step == "verified":
            (tmp_path / "demo").rename(tmp_path / "elsewhere")

    with pytest.raises(FileNotFoundError):
        put(tmp_path / "demo", replace=True, on_step=take_away)
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path, put: Publish) -> None:
    before = os.umask(0o022)
    try:
        put(tmp_path / "demo")
    finally:
        os.umask(before)
    assert (tmp_path / "demo").stat().st_mode & 0o777 == 0o755
    assert {one.stat().st_mode & 0o777 for one in (tmp_path / "demo").iterdir()} == {0o644}


def test_the_same_content_is_the_same_files(tmp_path: Path, put: Publish, manifest: Manifest) -> None:
    assert put(tmp_path / "one") == put(tmp_path / "two")
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    again = load_bundle(tmp_path / "one")
    later = replace(again.manifest, created="2027-01-01T00:00:00Z")
    digest = publish(tmp_path / "three", later, again.estimator, again.exemplars, again.report)
    assert digest != again.digest
    changed = {
        name for name, data in _bytes(tmp_path / "one").items() if _bytes(tmp_path / "three")[name] != data
    }
    assert changed == NAMES - set(manifest.files) - {"estimator.safetensors", "exemplars.jsonl", REPORT}


def test_an_existing_bundle_is_not_replaced_silently(tmp_path: Path, put: Publish) -> None:
    put(tmp_path / "demo", "old")
    before = _bytes(tmp_path / "demo")
    with pytest.raises(BundleExists, match="expected nothing, got a bundle"):
        put(tmp_path / "demo", "new")
    assert _bytes(tmp_path / "demo") == before
    put(tmp_path / "demo", "new", replace=True)
    assert load_bundle(tmp_path / "demo").manifest.name == "new"
    assert os.listdir(tmp_path) == ["demo"]


def test_a_damaged_bundle_may_be_replaced(tmp_path: Path, put: Publish) -> None:
    put(tmp_path / "demo")
    (tmp_path / "demo" / MANIFEST).unlink()
    (tmp_path / "demo" / REPORT).write_text("?")
    put(tmp_path / "demo", replace=True)
    load_bundle(tmp_path / "demo")


def test_an_empty_directory_is_nothing(tmp_path: Path, put: Publish) -> None:
    (tmp_path / "demo").mkdir()
    put(tmp_path / "demo")
    load_bundle(tmp_path / "demo")


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("kind", ["foreign file", "foreign folder", "file", "link", "dangling link"])
def test_what_is_no_bundle_is_never_replaced(
    tmp_path: Path, put: Publish, replacing: bool, kind: str
) -> None:
    root, path = tmp_path / "root", tmp_path / "root" / "demo"
    put(tmp_path / "elsewhere")
    if kind.startswith("foreign"):
        put(path)
        (path / "mine").touch() if kind == "foreign file" else (path / "mine").mkdir()
    elif kind == "file":
        root.mkdir()
        path.write_text("mine")
    else:
        root.mkdir()
        path.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(BundleExists, match="expected nothing"):
        put(path, "new", replace=replacing)
    assert os.listdir(root) == ["demo"]
    assert load_bundle(tmp_path / "elsewhere").manifest.name == "demo"
    if kind.startswith("foreign"):
        assert (path / "mine").exists()


def test_parts_that_do_not_fit_are_not_published(
    tmp_path: Path, manifest: Manifest, estimator: SDMEstimator, exemplars: tuple[Exemplar, ...]
) -> None:
    with pytest.raises(ContentError, match="support"):
        publish(tmp_path / "demo", manifest, estimator, exemplars[1:], {})
    with pytest.raises(ContentError, match="regions"):
        publish(tmp_path / "demo", replace(manifest, alphas=(0.9,)), estimator, exemplars, {})
    assert os.listdir(tmp_path) == []


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, put: Publish) -> None:
    put(tmp_path / "old", "old")

    class Interrupted(Exception):
        pass

    def interrupt(step: str) -> None:
        if step == "verified":
            raise Interrupted

    for path in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(Interrupted):
            put(path, "new", replace=True, on_step=interrupt)
    assert os.listdir(tmp_path) == ["old"]
    assert load_bundle(tmp_path / "old").manifest.name == "old"


def test_what_a_dead_publisher_left_is_removed_and_nothing_else(tmp_path: Path, put: Publish) -> None:
    left = tmp_path / ".tmp-bundle-0123"
    put(left)
    (left / REPORT).unlink()
    foreign = tmp_path / ".tmp-bundle-mine"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    (tmp_path / ".tmp-bundle-file").touch()
    (tmp_path / ".tmp-bundle-link").symlink_to(tmp_path / "demo")
    (tmp_path / ".tmp-other").mkdir()
    put(tmp_path / "demo")
    put(tmp_path / "demo", replace=True)
    assert sorted(os.listdir(tmp_path)) == [
        ".tmp-bundle-file",
        ".tmp-bundle-link",
        ".tmp-bundle-mine",
        ".tmp-other",
        "demo",
    ]


def test_a_reader_never_sees_a_replacement_under_way(tmp_path: Path, put: Publish) -> None:
    path, stop = tmp_path / "demo", threading.Event()
    digests = {put(path, "even"), put(path, "odd", replace=True)}
    seen: list[str] = []
    failures: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.append(load_bundle(path).digest)
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(30):
        put(path, ("even", "odd")[turn % 2], replace=True)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert set(seen) <= digests


def test_publishers_wait_for_each_other(tmp_path: Path, put: Publish) -> None:
    """While one is on its way, another neither starts nor takes the first one's files for a dead one's."""
    inside: list[str] = []
    most = 0

    def on_step(step: str) -> None:
        nonlocal most
        if step == "made the staging directory":
            inside.append(step)
        most = max(most, len(inside))
        if step == "made durable":
            inside.pop()

    threads = [
        threading.Thread(
            target=put, args=(tmp_path / "demo", f"b{i}"), kwargs={"replace": True, "on_step": on_step}
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert load_bundle(tmp_path / "demo").manifest.name in {f"b{i}" for i in range(6)}
    assert os.listdir(tmp_path) == ["demo"]


def test_listed(tmp_path: Path, put: Publish) -> None:
    digests = [put(tmp_path / "b", "beta"), put(tmp_path / "a", "alpha")]
    put(tmp_path / "z")
    (tmp_path / "z" / MANIFEST).write_text("{}")
    put(tmp_path / ".tmp-bundle-left")  # last, since the next publishing would remove it
    (tmp_path / "no bundle").mkdir()
    listed, faults = list_bundles(tmp_path)
    assert [(one.path.name, one.manifest.name, one.digest) for one in listed] == [
        ("a", "alpha", digests[1]),
        ("b", "beta", digests[0]),
    ]
    assert len(faults) == 1
    assert str(tmp_path / "z") in str(faults[0])
    assert list_bundles(tmp_path / "nowhere") == ([], [])


def test_resolved(tmp_path: Path, put: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    digest = put(root / "v1", "demo")
    put(root / "v2", "other")
    assert resolve(str(root / "v2"), root) == root / "v2"
    assert resolve("v2", root) == root / "v2"
    assert resolve("demo", root) == root / "v1"
    assert resolve(digest, root) == root / "v1"
    assert resolve(digest[:6].upper(), root) == root / "v1"
    # A folder of that name that holds no bundle, such as the source's own, hides nothing.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve("demo", root) == root / "v1"


def test_not_resolved(tmp_path: Path, put: Publish) -> None:
    digest = put(tmp_path / "v1", "demo")
    put(tmp_path / "v2", "other")
    for reference in ("", "nobody", digest[:5], "f" * 64, "a\0b", str(tmp_path / "v3")):
        with pytest.raises(BundleNotFound, match="no bundle") as caught:
            resolve(reference, tmp_path)
        assert "v1" in str(caught.value)
        assert digest[:12] in str(caught.value)
    put(tmp_path / "v3", "demo")
    with pytest.raises(BundleNotFound, match="more than one bundle") as caught:
        resolve("demo", tmp_path)
    assert "v1" in str(caught.value)
    assert "v3" in str(caught.value)
    assert "v2" not in str(caught.value)
    # Two of the same content are two directories; the path decides.
    with pytest.raises(BundleNotFound, match="more than one bundle"):
        resolve(digest, tmp_path)


def test_a_bundle_without_a_sound_manifest_is_named_where_none_fits(tmp_path: Path, put: Publish) -> None:
    put(tmp_path / "v1", "demo")
    (tmp_path / "v1" / MANIFEST).write_text("{}")
    with pytest.raises(BundleNotFound, match=MANIFEST):
        resolve("demo", tmp_path)
