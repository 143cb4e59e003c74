"""The manifest describes a bundle and lists the digest of every file in it.

Calibration makes the `Manifest`, with `files` still empty. Publishing adds size and SHA-256 of each file and writes
manifest.json, then manifest.json.sha256 beside it. Loading checks in reverse order: the digest verifies the manifest,
and the manifest verifies the files.

    digest(bundle) = SHA-256(manifest.json)

Two bundles therefore have the same digest exactly if they are the same in every byte. The digests find damage and
mix-ups. They do not prove who made a bundle: for that, compare the digest with one from another source.

docs/bundle-format.md specifies every field.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from candor.engine.base import AdapterIdentity as AdapterIdentity
from candor.engine.base import ModelIdentity, Representation
from candor.model_store import formats, strict_json
from candor.model_store.errors import Difference, ManifestError
from candor.policy.cascade import CascadeTerms
from candor.policy.certificate import Certificate, RuleTerms
from candor.policy.policy import Policy

FORMAT_VERSION = formats.LATEST

MANIFEST = "manifest.json"
SEAL = "manifest.json.sha256"
ESTIMATOR = "estimator.safetensors"
EXEMPLARS = "exemplars.jsonl"
REPORT = "report.json"

LIMITS = {MANIFEST: 2**20, ESTIMATOR: 4 * 2**30, EXEMPLARS: 2**30, REPORT: 64 * 2**20}
"""Maximum bytes of a file, checked before it is read, since it is held in memory as a whole."""

LISTED = (ESTIMATOR, EXEMPLARS, REPORT)
"""Files whose size and digest the manifest lists."""

NAMES = frozenset({MANIFEST, SEAL, *LISTED})
"""All files of a bundle. It has no others and no folders."""


@dataclass(frozen=True)
class FileEntry:
    """sha256: 64 lower-case hexadecimal digits. size: bytes."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    format_version: the format that it was written in. Publishing writes the latest.
    name: the name by which the bundle is chosen and served.
    created: ISO 8601 in UTC, such as 2026-01-31T12:00:00Z.
    adapter: None if the model's weights are served unchanged.
    alphas: target accuracies, ascending, each in (0.5, 1]; the estimator has one region for each.
    class_names: name of class 0, 1, ...
    passed_over: number of invalid neighbours that do not end q, at least 0 (`sdm.similarity`).
    certificates: those of the regions' answers; at most one for each alpha and estimator.
    rule: the two-gate rule's terms; None if the bundle has the papers' regions only. Its gate and score are tensors.
    cascade: what was certified of the rule together with another model that answers what the rule withholds; or None.
    provenance: where the data came from and how the bundle was made (digests, counts, seeds, settings).
    files: the entry of each name in `LISTED`; empty until published.

    Raises ManifestError, which lists every field out of its range.
    """

    format_version: int = FORMAT_VERSION
    name: str
    created: str
    model: ModelIdentity
    adapter: AdapterIdentity | None = None
    representation: Representation
    policy: Policy
    alphas: tuple[float, ...]
    class_names: tuple[str, ...]
    passed_over: int = 0
    certificates: tuple[Certificate, ...] = ()
    rule: RuleTerms | None = None
    cascade: CascadeTerms | None = None
    provenance: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults: list[Difference] = []

        def require(holds: bool, where: str, expected: str, actual: object) -> None:
            if not holds:
                faults.append(Difference(where, expected, strict_json.show(actual)))

        require(
            formats.FIRST <= self.format_version <= formats.LATEST,
            "format_version",
            f"{formats.FIRST} to {formats.LATEST}",
            self.format_version,
        )
        require(bool(self.name.strip()), "name", "a name", self.name)
        require(_is_utc(self.created), "created", "an ISO 8601 time in UTC", self.created)
        require(self.model.hidden_size > 0, "model.hidden_size", "a positive integer", self.model.hidden_size)
        alphas, names = self.alphas, self.class_names
        require(
            len(alphas) > 0
            and list(alphas) == sorted(set(alphas))
            and all(0.5 < alpha <= 1 for alpha in alphas),
            "alphas",
            "different numbers in (0.5, 1], ascending",
            alphas,
        )
        require(
            len(names) >= 2 and len(set(names)) == len(names) and all(name.strip() for name in names),
            "class_names",
            "two or more different names",
            names,
        )
        require(self.passed_over >= 0, "passed_over", "an integer of at least 0", self.passed_over)
        certified = [(one.alpha, one.estimator) for one in self.certificates]
        require(
            len(set(certified)) == len(certified) and {alpha for alpha, _ in certified} <= set(alphas),
            "certificates",
            f"at most one for each estimator and alpha of {list(alphas)}",
            certified,
        )
        require(self.rule is None or len(names) == 2, "rule", "null, or two class names", len(names))
        certified_by_rule = {one.alpha for one in self.rule.certificates} if self.rule else set()
        require(
            certified_by_rule <= set(alphas),
            "rule.certificates",
            f"alphas of {list(alphas)}",
            sorted(certified_by_rule),
        )
        certified_by_cascade = {one.alpha for one in self.cascade.certificates} if self.cascade else set()
        require(
            self.cascade is None or (self.rule is not None and certified_by_cascade <= set(alphas)),
            "cascade.certificates",
            f"none without a rule, and alphas of {list(alphas)}",
            sorted(certified_by_cascade),
        )
        # Only these names are allowed, so that no path can leave the directory.
        if self.files and set(self.files) != set(LISTED):
            require(False, "files", f"exactly {', '.join(LISTED)}", sorted(self.files))
        for name in (one for one in LISTED if one in self.files):
            entry, limit = self.files[name], LIMITS[name]
            is_digest = re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
            require(is_digest, f"files.{name}.sha256", "64 digits of 0-9a-f", entry.sha256)
            require(0 <= entry.size <= limit, f"files.{name}.size", f"0 to {limit} bytes", entry.size)
        if faults:
            raise _invalid(faults)

    def to_bytes(self) -> bytes:
        """Returns the bytes of manifest.json. Raises ManifestError if provenance is not JSON."""
        try:
            return strict_json.dump(asdict(self), indent=2) + b"\n"
        except (ValueError, TypeError) as error:
            raise ManifestError(
                "the manifest cannot be written",
                [Difference("provenance", "JSON: strings, finite numbers, lists, objects", str(error))],
                "Write null for what has no finite value.",
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Returns the manifest in manifest.json's bytes. Raises ManifestError."""
        faults: list[Difference] = []
        try:
            value = strict_json.parse(data)
        except ValueError as error:
            raise _invalid([Difference(MANIFEST, "a JSON object", str(error))]) from None
        version = value.get("format_version") if isinstance(value, dict) else None
        if type(version) is int:  # first, since another version has other fields
            if not formats.FIRST <= version <= formats.LATEST:
                raise ManifestError(
                    "the bundle has another format",
                    [Difference("format_version", f"{formats.FIRST} to {formats.LATEST}", str(version))],
                    "Use the version of candor that wrote it, or create the bundle anew with `candor calibrate`.",
                )
            value = formats.manifest_as_latest(value, version, faults)
        manifest: Manifest = strict_json.decode(cls, value, "", faults)
        if faults:
            raise _invalid(faults)
        if not manifest.files:
            raise _invalid([Difference("files", f"exactly {', '.join(LISTED)}", "none")])
        return manifest


def _invalid(faults: list[Difference]) -> ManifestError:
    return ManifestError(
        "the manifest is not valid", faults, "Create the bundle anew with `candor calibrate`."
    )


def seal(manifest: bytes) -> bytes:
    """Returns manifest.json.sha256 for manifest.json's bytes, in the form that `sha256sum -c` checks."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False
