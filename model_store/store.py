"""A folder of bundles: lists them, resolves a reference to one, and publishes one atomically.

Publishing takes these steps:

    write .tmp-bundle-*  ->  fsync  ->  load it, as a server would  ->  rename  ->  fsync the folder

At any time the path therefore holds the old bundle, the new one, or nothing if there was none before.
To replace a bundle, the new and the old directory change places in one system call (Linux,
renameat2 with RENAME_EXCHANGE), since removing the old one first would leave a gap.

A process that dies on the way leaves at most a `.tmp-bundle-*` beside the path. The next publisher
into the same folder removes it. Publishers into one folder wait for each other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.model_store.bundle import Exemplar, encode, load_bundle
from candor.model_store.directory import read_manifest
from candor.model_store.errors import BundleError, BundleExists, BundleNotFound, Difference
from candor.model_store.manifest import MANIFEST, NAMES, Manifest
from candor.sdm.estimator import SDMEstimator
from candor.sdm.rule import AnswerRule

_STAGED = ".tmp-bundle-"
_SHORTEST_PREFIX = 6

_AT_FDCWD = -100  # from linux/fcntl.h
_RENAME_EXCHANGE = 2  # from linux/fs.h


@dataclass(frozen=True)
class Listed:
    """A bundle in a folder. Only its manifest has been verified."""

    path: Path
    digest: str
    manifest: Manifest


def list_bundles(root: Path) -> tuple[list[Listed], list[BundleError]]:
    """Returns the bundles directly beneath `root`, by path, and the errors of those with a faulty manifest."""
    listed: list[Listed] = []
    faults: list[BundleError] = []
    for found in sorted(root.glob(f"*/{MANIFEST}")):
        if found.parent.name.startswith(_STAGED):
            continue
        try:
            manifest, digest = read_manifest(found.parent)
        except BundleError as error:
            faults.append(error)
        else:
            listed.append(Listed(found.parent, digest, manifest))
    return listed, faults


def resolve(reference: str, root: Path) -> Path:
    """Returns the directory of the bundle that `reference` names: a path, or a name or digest in `root`.

    It tries in this order: a path to a bundle, as given and beneath `root`; the name in a manifest, or
    the first 6 or more digits of a digest. Raises BundleNotFound if none matches, or more than one.
    """
    for path in (Path(reference), root / reference):
        if (path / MANIFEST).exists():
            return path
    listed, faults = list_bundles(root)
    prefix = reference.lower() if len(reference) >= _SHORTEST_PREFIX else None
    fitting = [
        one
        for one in listed
        if one.manifest.name == reference or (prefix is not None and one.digest.startswith(prefix))
    ]
    if len(fitting) == 1:
        return fitting[0].path
    there = [f"{one.path} ({one.manifest.name}, {one.digest[:12]})" for one in fitting or listed]
    raise BundleNotFound(
        f"{reference!r} means {'more than one bundle' if fitting else 'no bundle'}",
        [Difference(str(root), "one bundle of that path, name or digest", ", ".join(there) or "none")]
        + [one for fault in faults for one in fault.differences],
        "Give a path, a name or the first digits of a digest that only one of them has.",
    )


def publish(
    path: Path,
    manifest: Manifest,
    estimator: SDMEstimator,
    exemplars: Sequence[Exemplar],
    report: dict[str, Any],
    rule: AnswerRule | None = None,
    *,
    replace: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> str:
    """Writes a bundle to `path`, atomically and durably, and returns its digest.

    manifest: this function fills in its `files`. exemplars: one per support row, in that order.
    rule: the gate and score of `manifest.rule`.
    replace: whether a bundle at `path` may be replaced; an empty directory always may.
    on_step: called after each step with what was done, for a progress display.

    Raises BundleExists; ContentError or ManifestError if the parts do not fit together; OSError if the disk is full
    or not writable. After an error, `path` is unchanged.
    """
    files = encode(manifest, estimator, exemplars, report, rule)
    path = Path(os.path.abspath(path))
    _make_folder(path.parent)
    with _sole_publisher(path.parent):
        for left in path.parent.glob(_STAGED + "*"):
            if _holds_only_bundle_files(left):  # of a dead publisher: a live one would hold the lock
                _remove(left)
        occupied = _is_occupied(path, replace)
        staged = path.parent / f"{_STAGED}{secrets.token_hex(8)}"
        staged.mkdir()
        try:
            on_step("made the staging directory")
            for name, data in files.items():
                _write(staged / name, data)
                on_step(f"wrote {name}")
            _sync_folder(staged)
            digest = load_bundle(staged).digest
            on_step("verified")
            if occupied:
                _exchange(staged, path)
            else:
                os.rename(staged, path)  # fails unless the path is free or an empty directory
            on_step("put in place")
            _sync_folder(path.parent)
            on_step("made durable")
        finally:
            if staged.exists():
                _remove(staged)  # the old bundle, or the new one if publishing failed
    return digest


@contextmanager
def _sole_publisher(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the lock ends with the process, however it ends
        yield
    finally:
        os.close(handle)


def _is_occupied(path: Path, replace: bool) -> bool:
    """Returns whether a bundle is at `path`. Raises BundleExists if it must not be replaced."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        actual, remedy = "a file or symbolic link", "Publish to another path, or remove it first."
    elif not any(path.iterdir()):
        return False
    elif not _holds_only_bundle_files(path):
        actual, remedy = "other files", "They would be lost. Publish to another path, or move them away."
    elif not replace:
        actual, remedy = "a bundle", "Publish to another path, or allow replacing it (replace=True)."
    else:
        return True
    raise BundleExists("nothing was published", [Difference(str(path), "nothing", actual)], remedy)


def _holds_only_bundle_files(folder: Path) -> bool:
    """Returns whether the directory holds nothing but a bundle, whole or partial, so that it may be removed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return all(one.name in NAMES and not one.is_dir(follow_symlinks=False) for one in entries)


def _remove(folder: Path) -> None:
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _make_folder(folder: Path) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _sync_folder(one.parent)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two directories atomically. Python has no function for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if not failed:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(other))
    raise BundleExists(
        "nothing was published: this file system cannot exchange two directories",
        [Difference(str(other), "renameat2 with RENAME_EXCHANGE", os.strerror(code))],
        "Publish to another path and remove the old bundle.",
    )
