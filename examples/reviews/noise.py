"""What a tenth of wrong references does to the example, and what the suspects that calibration names are worth.

    python -m examples.reviews.noise          after python -m examples.reviews

References are turned by a fixed seed; the answers are kept, so no model is asked. Suspects are named among the
records that were fitted on; a person who looks at each mends the turned ones among them (here: the true reference is
put back). Records that certify are not looked at, and their references stay as they are, so a certificate under noise
speaks of noisy references.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from candor.calibration.data import Record, load
from candor.calibration.shapes import Reading
from candor.model_store.bundle import load_bundle
from candor.policy.conversation import shown
from examples.reviews.__main__ import FITTING, LENGTH, MAX_TOKENS, READ, Steps, percent
from examples.reviews.data import COLUMNS, SEED, VERIFIER, Sentence, read_csv, write_csv

SHARE = 0.1
LOOKS = 2
ALPHAS = ("0.8", "0.9", "0.95")


def turned(rows: list[Sentence], ids: set[str]) -> list[Sentence]:
    """The rows with these references turned."""
    return [
        replace(one, sentiment=one.opposite, opposite=one.sentiment) if one.id in ids else one for one in rows
    ]


def calibrated(steps: Steps, out: Path, name: str, data: Path) -> dict[str, Any]:
    """The report of a bundle made of these references."""
    made = steps.candor(
        name, "calibrate", "--model", out / "run/model", "--data", data, "--test", out / "test.csv", *READ,
        *FITTING, "--max-tokens", MAX_TOKENS, *LENGTH, "--hidden-cache", out / "answers-fine-tuned",
        "--out", out / f"bundle-{name}", "--json",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(made)["report"]
    return report


def fitted(bundle: Path, report: dict[str, Any], records: list[Record]) -> set[str]:
    """Ids of the records that the layer was fitted on."""
    training = {shown(one.messages) for one in load_bundle(bundle).exemplars}
    calibration = set(report["calibration_prompts"])
    return {one.id for one in records if one.prompt in training or one.prompt_digest in calibration}


def line(name: str, wrong: int, report: dict[str, Any]) -> str:
    gates, region = report["held_out"]["rule"], report["held_out"]["lower"]
    cells = [percent(gates[alpha]["answered"]) for alpha in ALPHAS]
    return f"| {name} | {wrong} | " + " | ".join([*cells, percent(region["0.8"]["answered"])]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/reviews-example"), help="the example's folder")
    out, steps = parser.parse_args().out, Steps()
    rows = read_csv(out / "calibration.csv")
    records = load(out / "calibration.csv", Reading.parse(COLUMNS, VERIFIER)).records
    wrong = set(random.Random(SEED).sample([one.id for one in rows], round(SHARE * len(rows))))
    clean = load_bundle(out / "bundle-fine-tuned").report
    lines = [line("clean", 0, clean)]
    for look in range(LOOKS + 1):
        name = "noisy" if look == 0 else f"mended-{look}"
        write_csv(out / f"{name}.csv", turned(rows, wrong))
        report = calibrated(steps, out, name, out / f"{name}.csv")
        among = fitted(out / f"bundle-{name}", report, records)
        suspects = {one["id"] for one in report["advice"]["suspects"]}
        found = suspects & wrong
        lines.append(line(name, len(wrong & among), report))
        print(
            f"{name}: {len(wrong & among)} of {len(among)} references fitted on are wrong; {len(suspects)} suspects, "
            f"of which {len(found)} are (precision {len(found) / max(1, len(suspects)):.2f}, recall "
            f"{len(found) / max(1, len(wrong & among)):.2f})"
        )
        wrong -= found
    print("\n| references | wrong, fitted on | answered at 0.8 | at 0.9 | at 0.95 | region, 0.8 |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
