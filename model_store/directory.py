"""Reads a bundle's directory so that the verified bytes are the parsed bytes.

    seal  --SHA-256-->  manifest  --size, SHA-256-->  every other file

Each file is opened once, beneath an open handle of the directory and never through a symbolic link. Its size is
checked before it is read; then it is read once into memory and hashed there. A change to the directory meanwhile
cannot make the parser see bytes that were not verified.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from candor.model_store.errors import BundleDamaged, BundleNotFound, Difference
from candor.model_store.manifest import LIMITS, LISTED, MANIFEST, NAMES, SEAL, FileEntry, Manifest, seal


@dataclass(frozen=True)
class VerifiedFiles:
    """Verified files. digest: SHA-256 of manifest.json, hexadecimal. data: bytes of each name in `LISTED`."""

    manifest: Manifest
    digest: str
    data: dict[str, bytes]


def read_directory(path: Path) -> VerifiedFiles:
    """Reads and verifies all files of the bundle at `path`.

    While a bundle is being replaced, this reads either the old or the new one, whole.
    Raises BundleNotFound, BundleDamaged (every file at fault is listed) or ManifestError.
    """
    while True:
        folder = _open_folder(path)
        try:
            return _read_files(folder, path)
        except BundleDamaged:
            if not _was_replaced(folder, path):
                raise
        finally:
            os.close(folder)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Reads and verifies the manifest at `path` and its digest. It does not read the other files.

    Raises BundleNotFound, BundleDamaged or ManifestError.
    """
    folder = _open_folder(path)
    try:
        faults: list[Difference] = []
        data = _read_sealed_manifest(folder, faults)
        if data is None:
            raise _damaged(path, faults)
        return Manifest.from_bytes(data), FileEntry.of(data).sha256
    finally:
        os.close(folder)


def _read_files(folder: int, path: Path) -> VerifiedFiles:
    faults: list[Difference] = []
    present = set(os.listdir(folder))
    sealed = _read_sealed_manifest(folder, faults)
    manifest = Manifest.from_bytes(sealed) if sealed is not None else None  # format before files
    for name in sorted(present - NAMES):
        faults.append(Difference(repr(name), "no such file", _kind_of(folder, name)))
    data: dict[str, bytes] = {}
    for name in LISTED:
        if manifest is None:  # without it, only missing files can be reported
            if name not in present:
                faults.append(Difference(name, "a file", "nothing"))
            continue
        entry = manifest.files[name]
        found = _read(folder, name, entry.size, faults, exact=True)
        if found is not None:
            data[name] = found
            actual = FileEntry.of(found).sha256
            if actual != entry.sha256:
                faults.append(Difference(name, f"SHA-256 {entry.sha256}", actual))
    if faults or manifest is None or sealed is None:
        raise _damaged(path, faults)
    return VerifiedFiles(manifest, FileEntry.of(sealed).sha256, data)


def _read_sealed_manifest(folder: int, faults: list[Difference]) -> bytes | None:
    """Returns the bytes of manifest.json if they match its seal, else None."""
    data = _read(folder, MANIFEST, LIMITS[MANIFEST], faults)
    found = _read(folder, SEAL, len(seal(b"")), faults, exact=True)
    if data is None or found is None:
        return None
    if found != seal(data):
        digest = found.partition(b" ")[0].decode("ascii", "backslashreplace")
        faults.append(Difference(MANIFEST, f"SHA-256 {digest} (from {SEAL})", FileEntry.of(data).sha256))
        return None
    return data


def _read(
    folder: int, name: str, size: int, faults: list[Difference], *, exact: bool = False
) -> bytes | None:
    """Returns the bytes of a regular file of `size` bytes (at most, or exactly), or None and adds a fault."""
    try:
        # O_NONBLOCK, since opening a named pipe would wait for a writer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        faults.append(Difference(name, "a file", "nothing"))
        return None
    except OSError as error:
        faults.append(Difference(name, "a file", _kind_of(folder, name, otherwise=str(error.strerror))))
        return None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            faults.append(Difference(name, "a file", _kind_of(folder, name)))
            return None
        if status.st_size > size or (exact and status.st_size < size):
            expected = f"{size} bytes" if exact else f"at most {size} bytes"
            faults.append(Difference(name, expected, f"{status.st_size} bytes"))
            return None
        with open(handle, "rb", closefd=False) as file:
            return file.read(size)  # the digest finds bytes cut off or added meanwhile
    except OSError as error:
        faults.append(Difference(name, "a file that can be read", str(error.strerror)))
        return None
    finally:
        os.close(handle)


def _kind_of(folder: int, name: str, otherwise: str = "a file") -> str:
    """Returns the kind of the entry in words; `otherwise` for a regular file."""
    try:
        kind = stat.S_IFMT(os.lstat(name, dir_fd=folder).st_mode)
    except OSError as error:
        return str(error.strerror)
    words = {stat.S_IFREG: otherwise, stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    return words.get(kind, "a device, pipe or socket")


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        actual = error.strerror if isinstance(error, OSError) else str(error)
        raise BundleNotFound(
            "there is no bundle",
            [Difference(str(path), "a directory", str(actual))],
            "Give the directory that `candor calibrate --out` wrote.",
        ) from None


def _was_replaced(folder: int, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(folder), os.stat(path))
    except OSError:
        return False


def _damaged(path: Path, faults: list[Difference]) -> BundleDamaged:
    return BundleDamaged(
        f"the bundle {path} is not as it was published",
        faults,
        "Nothing of it was used. Copy it anew from where it was published, or create it anew.",
    )
