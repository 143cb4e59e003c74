"""Authorisation by API keys, each with its scopes.

    path -> the scope it needs -> SHA-256 of the key that came -> is it in the file, with that scope -> in

    alice answer <sha256> weight=2 models=tiny,legal tokens-per-day=1000000        one line of the file

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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal, get_args

logger = logging.getLogger("candor")

Scope = Literal["answer", "feedback", "review", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "candor-"  # scanners for leaked secrets look for it
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WEIGHT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
_RETRY_S = 1.0  # between two tries to read a file that cannot be read
_SHA256 = re.compile(r"[0-9a-f]{64}")


class KeyFileError(Exception):
    """The file of keys cannot be used; the message says where and why."""


class NoKeys(KeyFileError):
    """The file can be read and has no key."""


class Unauthorized(Exception):
    """The request has no key, or an unknown one."""


class Forbidden(Exception):
    """The key is known but lacks the needed scope."""

    def __init__(self, needed: Scope) -> None:
        super().__init__(f"this key may not do that: it needs the scope {needed!r}")


@dataclass(frozen=True)
class Key:
    """One line of the file. name: used in logs and rate limits, not secret. sha256: hex hash of the key's UTF-8.

    weight: its part of the places that are kept for keys, beside the others' weights, > 0.
    models: names that it may ask for; None allows all. tokens_per_day: its quota; None sets none.
    """

    name: str
    scopes: frozenset[Scope]
    sha256: str
    weight: float = 1.0
    models: frozenset[str] | None = None
    tokens_per_day: int | None = None

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
    """Reads lines `name scope,scope sha256`, each with options behind it or none; it skips blank lines and lines that
    begin with #.

    Raises NoKeys for a file without a key, KeyFileError for an unreadable file, a malformed line or a repeated name.
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
        scopes = fields[1].split(",") if len(fields) >= 3 else []
        sound = len(fields) >= 3 and _NAME.fullmatch(fields[0]) and _SHA256.fullmatch(fields[2])
        options = _options(fields[3:])
        if not sound or not scopes or set(scopes) - set(SCOPES) or options is None:
            raise KeyFileError(  # without the line itself: it may contain a key
                f"{path}, line {number}: expected `name scope,scope sha256` with scopes among {', '.join(SCOPES)}, "
                "and behind it none or some of weight=NUMBER, models=NAME,NAME, tokens-per-day=NUMBER"
            )
        if fields[0] in keys:
            raise KeyFileError(f"{path}, line {number}: the name {fields[0]} stands there twice")
        known = frozenset(scope for scope in SCOPES if scope in scopes)
        keys[fields[0]] = Key(fields[0], known, fields[2], **options)
    if not keys:
        raise NoKeys(f"there is no key in {path}; make one with `candor key NAME --file {path}`")
    return tuple(keys.values())


def _options(fields: Sequence[str]) -> dict[str, Any] | None:
    """Returns the options of a line by field of `Key`; None if one is malformed."""
    found: dict[str, Any] = {}
    for field in fields:
        match field.split("=", 1):
            case ["weight", text] if _WEIGHT.fullmatch(text) and float(text) > 0:
                found["weight"] = float(text)
            case ["models", text] if text and all(text.split(",")):
                found["models"] = frozenset(text.split(","))
            case ["tokens-per-day", text] if text.isdecimal() and len(text) < 16:
                found["tokens_per_day"] = int(text)
            case _:
                return None
    return found


class KeyRing:
    """The keys of a file. It reads the file again when it changes, so removing a line revokes the key.

    An empty file locks everybody out. A file that cannot be read (unreadable, absent, malformed) is tried again every
    second; the keys that were read last stay valid for `grace_s`, then everybody is locked out until it can be read.
    """

    def __init__(self, path: Path, grace_s: float = 60.0, clock: Callable[[], float] = monotonic) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._grace_s = grace_s
        self._clock = clock
        self._seen = _stamp(path)
        self._keys = read_keys(path)
        self._failed_since: float | None = None
        self._tried = clock()

    def find(self, presented: str) -> Key | None:
        """Returns the known key, or None. It compares with every key, each in constant time."""
        self._refresh()
        sha256 = _hash(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        return found

    def weights(self) -> dict[str, float]:
        """Returns the weight of each key that may ask for answers, by its name."""
        return {key.name: key.weight for key in self._keys if "answer" in key.scopes}

    def stale_s(self) -> float:
        """Returns for how many seconds the file could not be read; 0 if it can."""
        return 0.0 if self._failed_since is None else self._clock() - self._failed_since

    def _refresh(self) -> None:
        now, stamp = self._clock(), _stamp(self._path)
        again = self._failed_since is not None and now - self._tried >= _RETRY_S
        if stamp == self._seen and not again:
            return
        self._seen, self._tried = stamp, now
        try:
            self._keys = read_keys(self._path)
        except NoKeys:
            self._keys = ()
            logger.error("%s has no key any more: everybody is locked out", self._path)
        except KeyFileError as error:
            self._fail(now, error)
            return
        else:
            logger.info("read the keys again: %s", ", ".join(key.name for key in self._keys))
        self._failed_since = None

    def _fail(self, now: float, error: KeyFileError) -> None:
        if self._failed_since is None:
            self._failed_since = now
            logger.error("the keys that were read before stay for %g s: %s", self._grace_s, error)
        elif self._keys and now - self._failed_since >= self._grace_s:
            self._keys = ()
            logger.error("everybody is locked out until the keys can be read: %s", error)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
