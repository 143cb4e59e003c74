"""Authorisation by API keys, each with its scopes.

    path -> the scope it needs -> SHA-256 of the key that came -> is it in the file, with that scope -> in

The file holds only hashes of keys, so reading it gives no access. A key has 256 random bits and cannot be
guessed, so a plain hash is enough and is fast. Every path needs a scope unless `app.edge.middleware` names it as
open; a route that is not listed there needs the scope `operate`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

logger = logging.getLogger("candor")

Scope = Literal["answer", "feedback", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "candor-"  # scanners for leaked secrets look for it
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class KeyFileError(Exception):
    """The file of keys cannot be used; the message says where and why."""


class Unauthorized(Exception):
    """The request has no key, or an unknown one."""


class Forbidden(Exception):
    """The key is known but lacks the needed scope."""

    def __init__(self, needed: Scope) -> None:
        super().__init__(f"this key may not do that: it needs the scope {needed!r}")


@dataclass(frozen=True)
class Key:
    """One line of the file. name: used in logs and rate limits, not secret. sha256: hex hash of the key's UTF-8."""

    name: str
    scopes: frozenset[Scope]
    sha256: str

    def line(self) -> str:
        return f"{self.name} {','.join(sorted(self.scopes))} {self.sha256}\n"


def make_key(name: str, scopes: Collection[Scope]) -> tuple[str, Key]:
    """Returns a new key, to be shown once, and its line for the file. Raises KeyFileError for a bad argument."""
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"expected a name of letters, digits, '.', '_' and '-', got {name!a}")
    if not scopes or set(scopes) - set(SCOPES):
        raise KeyFileError(f"expected scopes among {', '.join(SCOPES)}, got {', '.join(scopes) or 'none'}")
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, Key(name, frozenset(scopes), _hash(key))


def read_keys(path: Path) -> tuple[Key, ...]:
    """Reads lines `name scope,scope sha256`; it skips blank lines and lines that begin with #.

    Raises KeyFileError for an unreadable file, a malformed line, a repeated name, or no key at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(
            f"cannot read the keys in {path}: {error}; make one with `candor key NAME --file {path}`"
        ) from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        scopes = fields[1].split(",") if len(fields) == 3 else []
        sound = len(fields) == 3 and _NAME.fullmatch(fields[0]) and _SHA256.fullmatch(fields[2])
        if not sound or not scopes or set(scopes) - set(SCOPES):
            raise KeyFileError(  # without the line itself: it may contain a key
                f"{path}, line {number}: expected `name scope,scope sha256` with scopes among {', '.join(SCOPES)}"
            )
        if fields[0] in keys:
            raise KeyFileError(f"{path}, line {number}: the name {fields[0]} stands there twice")
        keys[fields[0]] = Key(fields[0], frozenset(scope for scope in SCOPES if scope in scopes), fields[2])
    if not keys:
        raise KeyFileError(f"there is no key in {path}; make one with `candor key NAME --file {path}`")
    return tuple(keys.values())


class KeyRing:
    """The keys of a file. It reads the file again when it changes, so removing a line revokes the key.

    If the file becomes unusable, the keys that were read last stay valid, and an error is logged.
    """

    def __init__(self, path: Path) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._seen = _stamp(path)
        self._keys = read_keys(path)

    def find(self, presented: str) -> Key | None:
        """Returns the known key, or None. It compares with every key, each in constant time."""
        self._refresh()
        sha256 = _hash(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        return found

    def _refresh(self) -> None:
        now = _stamp(self._path)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._keys = read_keys(self._path)
        except KeyFileError as error:
            logger.error("the keys that were read before stay: %s", error)
        else:
            logger.info("read the keys again: %s", ", ".join(key.name for key in self._keys))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
