"""What can be wrong with a bundle, and how it is said: expected, actual, what to do.

    BundleError
    ├── BundleNotFound   no bundle is meant by that path, name or digest, or more than one is
    ├── BundleExists     something stands where a bundle shall be published
    ├── BundleDamaged    files are missing, extra, changed, too large, unreadable or no regular files
    ├── ManifestError    the manifest is not one that this program understands
    └── ContentError     every file is as it was published, yet they do not fit together

All that differs is listed at once, so that one run is enough to know the whole damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be. `where`: a file, a field or a tensor."""

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
    """No bundle is meant by that path, name or digest prefix, or more than one is."""


class BundleExists(BundleError):
    """Something stands where a bundle shall be published, and it was not said to be replaced."""


class BundleDamaged(BundleError):
    """Files are missing, extra, changed, too large, unreadable or no regular files."""


class ManifestError(BundleError):
    """The manifest is not one that this program understands."""


class ContentError(BundleError):
    """Every file is as it was published, yet they do not fit together."""
