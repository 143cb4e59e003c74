"""Nothing that is not as it was published is read, and all of it is said at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path, PosixPath

import pytest

from candor.model_store.directory import read_directory, read_manifest
from candor.model_store.errors import BundleDamaged, BundleError, BundleNotFound, ManifestError
from candor.model_store.manifest import (
    ESTIMATOR,
    EXEMPLARS,
    LISTED,
    MANIFEST,
    NAMES,
    REPORT,
    SEAL,
    FileEntry,
    seal,
)

Files = dict[str, bytes]


@pytest.fixture
def folder(tmp_path: Path, files: Files, write: Callable[[Path, Files], Path]) -> Path:
    return write(tmp_path / "bundle", files)


def _faults(folder: Path) -> dict[str, tuple[str, str]]:
    with pytest.raises(BundleDamaged) as caught:
        read_directory(folder)
    return {one.where: (one.expected, one.actual) for one in caught.value.differences}


def test_sound(folder: Path, files: Files) -> None:
    verified = read_directory(folder)
    assert verified.data == {name: files[name] for name in LISTED}
    assert verified.digest == FileEntry.of(files[MANIFEST]).sha256
    assert (verified.manifest, verified.digest) == read_manifest(folder)


@pytest.mark.parametrize("name", LISTED)
def test_a_changed_byte_names_both_digests(folder: Path, files: Files, name: str) -> None:
    changed = bytearray(files[name])
    changed[len(changed) // 2] ^= 1
    (folder / name).write_bytes(changed)
    expected, actual = FileEntry.of(files[name]).sha256, FileEntry.of(bytes(changed)).sha256
    assert _faults(folder) == {name: (f"SHA-256 {expected}", actual)}


def test_a_changed_manifest(folder: Path, files: Files) -> None:
    changed = files[MANIFEST].replace(b'"demo"', b'"Demo"')  # still a valid one
    (folder / MANIFEST).write_bytes(changed)
    sealed, actual = FileEntry.of(files[MANIFEST]).sha256, FileEntry.of(changed).sha256
    assert _faults(folder) == {MANIFEST: (f"SHA-256 {sealed} (from {SEAL})", actual)}
    with pytest.raises(BundleDamaged):
        read_manifest(folder)


def test_a_seal_in_other_words_is_none(folder: Path, files: Files) -> None:
    (folder / SEAL).write_bytes(files[SEAL].replace(b"  ", b" *"))  # sha256sum's mark of a binary file
    assert set(_faults(folder)) == {MANIFEST}
    (folder / SEAL).write_bytes(b"\xff" * len(files[SEAL]))
    assert set(_faults(folder)) == {MANIFEST}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert _faults(folder) == {name: ("a file", "nothing")}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_shorter_and_a_longer_file(folder: Path, files: Files, name: str) -> None:
    size = len(files[name])
    for data in (files[name][:-1], files[name] + b"\n"):
        (folder / name).write_bytes(data)
        (expected, actual) = _faults(folder)[name]
        if name != MANIFEST:  # of which only the digest is known
            assert (expected, actual) == (f"{size} bytes", f"{len(data)} bytes")


def test_everything_at_once(folder: Path, files: Files) -> None:
    (folder / ESTIMATOR).unlink()
    (folder / EXEMPLARS).write_bytes(b"x" + files[EXEMPLARS][1:])
    (folder / REPORT).write_bytes(files[REPORT] + b" ")
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    (folder / b"\xff\n".decode("utf-8", "surrogateescape")).touch()
    faults = _faults(folder)
    assert faults[ESTIMATOR] == ("a file", "nothing")
    assert faults[EXEMPLARS][0].startswith("SHA-256 ")
    assert faults[REPORT] == (f"{len(files[REPORT])} bytes", f"{len(files[REPORT]) + 1} bytes")
    assert faults["'notes.txt'"] == ("no such file", "a file")
    assert faults["'.hidden'"] == ("no such file", "a directory")
    assert faults["'\\udcff\\n'"] == ("no such file", "a file")
    assert len(faults) == 6
    with pytest.raises(BundleDamaged) as caught:
        read_directory(folder)
    message = str(caught.value)
    message.encode()  # can be printed
    assert str(folder) in message
    assert "Copy it anew" in message


def test_without_its_manifest_what_is_missing_and_extra_is_still_said(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / REPORT).unlink()
    (folder / "notes.txt").touch()
    assert set(_faults(folder)) == {MANIFEST, REPORT, "'notes.txt'"}


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "socket"])
def test_no_regular_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    place = folder / name
    place.rename(tmp_path / "elsewhere")  # so that a link followed would lead to the right bytes
    if kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        monkeypatch.chdir(folder)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    said = {"link": "a symbolic link", "folder": "a directory"}.get(kind, "a device, pipe or socket")
    assert _faults(folder) == {name: ("a file", said)}


def test_a_file_without_leave_to_read(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / REPORT).chmod(0)
    assert _faults(folder) == {REPORT: ("a file", "Permission denied")}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_huge_file_is_not_read(folder: Path, name: str) -> None:
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)  # 1 TiB of nothing: reading it would not end
    assert _faults(folder)[name][1] == f"{2**40} bytes"


def test_the_format_is_said_before_its_files(folder: Path) -> None:
    later = b'{"format_version": 8}'
    (folder / MANIFEST).write_bytes(later)
    (folder / SEAL).write_bytes(seal(later))
    (folder / "ensemble.safetensors").touch()
    with pytest.raises(ManifestError, match="format_version: expected 1 to 7, got 8"):
        read_directory(folder)


def test_no_directory(tmp_path: Path, folder: Path) -> None:
    for path, actual in (
        (tmp_path / "nowhere", "No such file or directory"),
        (folder / REPORT, "Not a directory"),
        (Path("with\0nul"), ".*embedded null (byte|character)"),
    ):
        with pytest.raises(BundleNotFound, match=f"expected a directory, got {actual}"):
            read_directory(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError) as caught:
        read_directory(tmp_path / "empty")
    assert {one.where for one in caught.value.differences} == NAMES


def test_the_directory_itself_may_be_a_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert read_directory(tmp_path / "current").digest == read_directory(folder).digest


class _Switched(PosixPath):
    """A path beneath which the directory changes between its first look-up and its second."""

    first: Path | None

    def __fspath__(self) -> str:
        now, self.first = self.first, None
        return str(now) if now is not None else super().__fspath__()


def test_a_bundle_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, folder: Path, files: Files, write: Callable[[Path, Files], Path]
) -> None:
    old = write(tmp_path / "old", {MANIFEST: files[MANIFEST], SEAL: files[SEAL]})  # its removal has begun
    path = _Switched(folder)
    path.first = old
    assert set(read_directory(path).data) == set(LISTED)
    path.first = folder / "nowhere"
    with pytest.raises(BundleNotFound):
        read_directory(path)


def test_reading_leaves_no_open_files(folder: Path) -> None:
    (folder / REPORT).unlink()
    (folder / REPORT).mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        _faults(folder)
    assert len(os.listdir("/proc/self/fd")) == before
