"""Which bundles were promoted: a small file beside the bundle that the operator configured.

    {"tiny": {"over": DIGEST, "bundle": {"path": ..., "digest": DIGEST}, "previous": {...} or null}}

A promotion is in the file, with an fsync, before any request is answered by it, so it survives the server's end at
any moment. It goes before the setting for as long as the setting names the bundle that it was promoted `over`: an
operator who configures another bundle means that one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from candor.model_store import strict_json
from candor.model_store.directory import read_manifest
from candor.model_store.errors import Difference

logger = logging.getLogger("candor")


class PromotedFileError(Exception):
    """The file of promotions cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Located:
    """A bundle's directory, and the digest that it had there."""

    path: str
    digest: str


@dataclass(frozen=True)
class Promotion:
    """What was promoted for one name. over: digest of the configured bundle. previous: what rollback goes back to."""

    over: str
    bundle: Located
    previous: Located | None


class Promotions:
    """The file's content, by the bundles' name. path: the file, which need not exist."""

    def __init__(self, path: Path) -> None:
        """Raises PromotedFileError."""
        self.path = path
        self.over: dict[str, str] = {}
        """Digests of the configured bundles, by their name, as far as `serving` was asked."""
        self._entries: Mapping[str, Promotion] = {}
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise PromotedFileError(f"cannot read which bundle was promoted: {error}") from error
        faults: list[Difference] = []
        try:
            self._entries = strict_json.decode(dict[str, Promotion], strict_json.parse(data), "", faults)
        except ValueError as error:
            faults.append(Difference("it", "JSON", str(error)))
        if faults:
            raise PromotedFileError(
                f"{path} does not say which bundle was promoted ({'; '.join(map(str, faults))}); remove it to serve "
                "the configured bundle"
            )

    @classmethod
    def beside(cls, bundle: Path) -> Promotions:
        """Those of a server that was configured with the bundle in that directory. Raises PromotedFileError."""
        whole = Path(os.path.abspath(bundle))
        return cls(whole.with_name(whole.name + ".promoted.json"))

    def of(self, name: str) -> Promotion | None:
        return self._entries.get(name)

    def serving(self, configured: Path) -> Path:
        """Returns the directory to serve where that one is configured. Raises BundleError or PromotedFileError."""
        manifest, digest = read_manifest(configured)
        self.over[manifest.name] = digest
        promotion = self._entries.get(manifest.name)
        if promotion is None:
            return configured
        if promotion.over != digest:
            logger.warning(
                "%s was configured anew: it goes before %s, which was promoted over an earlier bundle",
                configured,
                promotion.bundle.path,
            )
            return configured
        return located(promotion.bundle, self.path)

    def put(self, name: str, promotion: Promotion) -> None:
        """Writes what is promoted now, atomically and durably. Raises OSError."""
        entries = {one: entry for one, entry in self._entries.items() if one != name}
        if promotion.bundle.digest != promotion.over or promotion.previous is not None:
            entries[name] = promotion  # else it is the configured one
        staged = self.path.with_name(self.path.name + ".tmp")
        text = json.dumps({one: asdict(entry) for one, entry in entries.items()}, indent=2)
        with open(staged, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._entries = entries


def located(bundle: Located, file: Path) -> Path:
    """Returns the directory if it still holds that bundle. Raises BundleError or PromotedFileError."""
    path = Path(bundle.path)
    found = read_manifest(path)[1]
    if found != bundle.digest:
        raise PromotedFileError(
            f"{file} says that the bundle {bundle.digest[:12]} in {path} was promoted, and {found[:12]} is there: "
            "put it back, or remove the file to serve the configured bundle"
        )
    return path
