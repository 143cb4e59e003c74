"""The errors of a bundle. Each message says what was expected, what was found and what to do.

    BundleError
    ├── BundleNotFound   no bundle, or more than one, matches the path, name or digest
    ├── BundleExists     the path to publish a bundle at is taken
    ├── BundleDamaged    files are missing, extra, changed, too large, unreadable or no regular files
    ├── ManifestError    this program does not understand the manifest
    └── ContentError     every file is as it was published, but the files do not fit together

A message lists all differences at once, so that one run shows the whole damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One difference between expected and actual. `where`: a file, a field or a tensor."""

    where: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.actual}"


class BundleError(Exception):
    """A bundle cannot be read or published. The message holds every difference and the remedy."""

    def __init__(self, what: str, differences: Sequence[Difference] = (), remedy: str = "") -> None:
        self.what = what
        self.differences = tuple(differences)
        self.remedy = remedy
        lines = [what + (":" if differences else ""), *(f"  {one}" for one in self.differences)]
        super().__init__("\n".join([*lines, remedy] if remedy else lines))


class BundleNotFound(BundleError):
    """No bundle, or more than one, matches the path, name or digest prefix."""


class BundleExists(BundleError):
    """The path to publish a bundle at is taken, and the caller did not ask to replace what is there."""


class BundleDamaged(BundleError):
    """Files are missing, extra, changed, too large, unreadable or no regular files."""


class ManifestError(BundleError):
    """This program does not understand the manifest."""


class ContentError(BundleError):
    """Every file is as it was published, but the files do not fit together."""
