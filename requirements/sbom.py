"""The bill of materials of a lock, as CycloneDX 1.6 JSON: each package with its licence and the digests of its files.

    python requirements/sbom.py requirements/cpu.txt requirements/cpu-torch.txt > candor.cdx.json
    python requirements/sbom.py --licences requirements/cpu.txt ...       a line a package: name, version, licence

Licences are those that the installed packages declare; a package that is not installed here has none in the list. The
output depends on locks and packages alone, so the same release gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^ ;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_READ = {"oss-harmony": "Apache-2.0", "setuptools": "MIT", "sigstore-models": "MIT"}
"""Licences of packages that declare none, as their licence files have them."""

_PYPI = "https://pypi.org/project"
_PYTORCH = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Pinned:
    name: str
    version: str
    digests: tuple[str, ...]

    @property
    def purl(self) -> str:
        local = f"?repository_url={_PYTORCH}" if "+" in self.version else ""
        return f"pkg:pypi/{self.name}@{self.version.replace('+', '%2B')}{local}"

    def licence(self) -> str | None:
        """Returns the licence that the installed package of this version declares, or None."""
        try:
            declared = metadata(self.name)
        except PackageNotFoundError:
            return None
        if declared["Version"] != self.version:
            return None
        if expression := declared["License-Expression"]:
            return str(expression)
        classifiers = [
            line.rpartition(" :: ")[2]
            for line in declared.get_all("Classifier") or ()
            if line.startswith("License :: ") and not line.endswith("OSI Approved")
        ]
        first_line = (declared["License"] or "").strip().partition("\n")[0]  # some put the whole text there
        return " AND ".join(classifiers) or first_line[:80] or _READ.get(self.name)

    def component(self) -> dict[str, Any]:
        source = _PYTORCH if "+" in self.version else f"{_PYPI}/{self.name}/{self.version}/"
        found: dict[str, Any] = {
            "type": "library",
            "bom-ref": self.purl,
            "name": self.name,
            "version": self.version,
            "purl": self.purl,
            "externalReferences": [
                {
                    "type": "distribution",
                    "url": source,
                    "hashes": [{"alg": "SHA-256", "content": digest} for digest in self.digests],
                }
            ],
        }
        if licence := self.licence():
            found["licenses"] = [{"license": {"name": licence}}]
        return found


def read_lock(path: Path) -> list[Pinned]:
    """Returns the pinned packages of a lock, in its order. Raises ValueError for one without a digest."""
    found: list[Pinned] = []
    for block in re.split(r"\n(?=[A-Za-z0-9])", path.read_text(encoding="utf-8")):
        if (pinned := _PINNED.match(block)) is None:
            continue
        digests = tuple(sorted(_HASH.findall(block)))
        if not digests:
            raise ValueError(f"{path}: {pinned[1]} has no digest")
        found.append(Pinned(pinned[1].lower(), pinned[2], digests))
    return found


def bill(version: str, packages: list[Pinned]) -> dict[str, Any]:
    """Returns the CycloneDX document of Candor in this version with these packages."""
    components = [one.component() for one in sorted(packages, key=lambda one: one.name)]
    root = f"pkg:pypi/candor@{version}"
    content = json.dumps(components, sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, root + content)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "candor",
                "version": version,
                "purl": root,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": [one["bom-ref"] for one in components]}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("locks", nargs="+", type=Path)
    parser.add_argument("--licences", action="store_true")
    given = parser.parse_args()
    packages = [one for lock in given.locks for one in read_lock(lock)]
    if given.licences:
        for one in sorted(packages, key=lambda one: one.name):
            print(f"{one.name} {one.version}: {one.licence() or 'not declared'}")
        return
    print(json.dumps(bill(metadata("candor")["Version"], packages), indent=1))


if __name__ == "__main__":
    main()
