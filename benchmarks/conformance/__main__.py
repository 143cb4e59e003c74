"""`python -m benchmarks.conformance DIR [--json]`: every fixture of a folder, one line each.

A fixture is known by the arrays it holds, not by its name. The exit code is 1 if anything differs, if a fixture
holds nothing that is recognised, or if the folder holds no fixture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.conformance.ensemble import check_ensemble
from benchmarks.conformance.estimator import check_estimator
from benchmarks.conformance.fixture import Fixture, Tally, find, load
from benchmarks.conformance.language_model import check_losses, check_texts
from benchmarks.conformance.training import check_training
from benchmarks.conformance.units import check_units

CHECKS: dict[str, Callable[[Fixture, Tally], None]] = {
    "train_h": check_estimator,
    "perm": check_training,
    "act_c2_z": check_units,
    "ecdf0_query": check_units,
    "neff0_query": check_units,
    "alg1_offsets": check_units,
    "ens_y_hat": check_ensemble,
    "lm0_logits": check_losses,
}
"""The check for each kind of fixture, by an array that only this kind holds."""

INFORMATIVE = {"y_test", "test_kind"}
"""Arrays that describe a fixture and are not used in any computation."""


def check(fixture: Fixture) -> Tally:
    """Compares everything that a fixture records."""
    tally = Tally()
    checks = dict.fromkeys(check for array, check in CHECKS.items() if array in fixture)
    if isinstance(fixture.settings, list):
        checks[check_texts] = None
    for run in checks:
        try:
            run(fixture, tally)
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            tally.mismatches[f"{run.__name__} ended early: {type(error).__name__}: {error}"] += 1
    if not tally.rows:
        tally.mismatches["nothing recognised"] += 1
    return tally


def report(path: Path) -> dict[str, object]:
    """One fixture's line, as a JSON-ready object."""
    fixture = load(path)
    tally = check(fixture)
    return {
        "name": fixture.name,
        "rows": tally.rows,
        "mismatches": sum(tally.mismatches.values()),
        "differing": dict(tally.mismatches),
        "comparisons": len(tally.compared),
        "not_compared": [name for name in fixture.unread() if name not in INFORMATIVE],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder of fixtures (.npz with .json beside, or .json alone)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    paths = find(options.folder)
    reports = []
    for path in paths:
        line = report(path)
        reports.append(line)
        if not options.json:
            notes = [f"{what} ({n})" for what, n in line["differing"].items()]  # type: ignore[attr-defined]
            notes += [f"not compared: {', '.join(line['not_compared'])}"] if line["not_compared"] else []  # type: ignore[arg-type]
            print(
                f"{line['name']}: {line['rows']} rows, {line['mismatches']} mismatches",
                *notes,
                sep="; ",
                flush=True,
            )
    mismatches = sum(int(str(line["mismatches"])) for line in reports)
    if options.json:
        rows = sum(int(str(line["rows"])) for line in reports)
        print(json.dumps({"fixtures": reports, "rows": rows, "mismatches": mismatches}))
    if not paths:
        print(
            f"no fixtures in {options.folder}: expected .npz files, or .json files of texts", file=sys.stderr
        )
    return 1 if mismatches or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
