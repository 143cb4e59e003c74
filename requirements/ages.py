"""How old the pinned packages are: each with the day it was published, oldest first.

    make ages                  of requirements/cpu-dev.txt; EXTRA=cuda of the other

Reads the lock that `uv pip compile --format pylock.toml` wrote, which has the day of each file's upload.
"""

from __future__ import annotations

import sys
import tomllib
from datetime import date, datetime
from pathlib import Path
from statistics import median
from typing import Any


def published(package: dict[str, Any]) -> date | None:
    """The day of its first file; None where the index does not tell."""
    files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
    days: list[datetime] = [file["upload-time"] for file in files if "upload-time" in file]
    return min(days).date() if days else None


def main() -> None:
    packages = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["packages"]
    known = [(day, one) for one in packages if (day := published(one))]
    known.sort(key=lambda pair: (pair[0], pair[1]["name"]))
    for day, one in known:
        print(day, one["name"], one["version"])
    days = [(date.today() - day).days for day, _ in known]
    print(
        f"{len(packages)} packages, {len(packages) - len(known)} of unknown age; median {median(days):g} days; "
        f"older than one year {sum(age > 365 for age in days)}, than two {sum(age > 730 for age in days)}"
    )


if __name__ == "__main__":
    main()
