"""A language model as verifier over HTTP: what it costs, and that a killed run pays for no verdict twice.

    python -m benchmarks.judging --example var/reviews-example --judge var/models/smollm2-135m-instruct

vLLM's own server serves the judge, a second model, and counts what it is asked. The answers to be judged are kept
from `python -m examples.reviews`, so nothing else is asked. `candor calibrate` is killed with SIGKILL when half of
the verdicts are there, and given again. Verdicts on their way when it dies are lost and asked for again: as many as
the judge has in flight, at most.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.servers import bind_all_cores, plain_vllm

IN_FLIGHT = 8
RUBRIC = "Right if the answer names the sentiment of the text, which the reference is: positive or negative."
COUNTERS = ("request_success", "prompt_tokens", "generation_tokens")


def counted(url: str) -> dict[str, int]:
    """What the judge's server has been asked and has written so far."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    sums = {
        name: sum(map(float, re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)))
        for name in COUNTERS
    }
    return {name: int(value) for name, value in sums.items()}


def settled(url: str) -> dict[str, int]:
    """The counters, once they stand still."""
    before = counted(url)
    while True:
        time.sleep(2)
        if (now := counted(url)) == before:
            return now
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--example", type=Path, default=Path("var/reviews-example"))
    parser.add_argument("--judge", type=Path, default=Path("var/models/smollm2-135m-instruct"))
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    bind_all_cores()
    serving = ["--served-model-name", "judge", "--max-model-len", "1024", "--block-size", "32"]
    serving += ["--kv-cache-memory-bytes", str(1 << 30), *(["--enforce-eager"] if given.eager else [])]
    with TemporaryDirectory() as folder, plain_vllm(given.judge, serving) as server:
        place = Path(folder)
        (place / "judge.toml").write_text(
            f'url = "{server.url}/v1"\nmodel = "judge"\nrubric = "{RUBRIC}"\nconcurrency = {IN_FLIGHT}\n'
        )
        first = _first(given.example / "calibration.csv", place / "data.csv", given.records)
        shutil.copytree(given.example / "answers-fine-tuned", place / "answers")
        command = [
            *(sys.executable, "-m", "candor.app.cli", "calibrate", "--model", given.example / "run/model"),
            *("--data", place / "data.csv", "--columns", "prompt=question, reference=sentiment"),
            *("--verifier", "judge(judge.toml)", "--alpha", "0.8", "--rounds", "2", "--epochs", "20"),
            *("--exemplar-dim", "64", "--max-tokens", "16", "--max-model-len", "512"),
            *("--hidden-cache", place / "answers", "--out", place / "bundle"),
        ]
        words = list(map(str, command))
        began = counted(server.url)["request_success"]
        run = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while counted(server.url)["request_success"] - began < first / 2 and run.poll() is None:
            time.sleep(0.05)
        killed = run.poll() is None
        run.kill()
        run.wait()
        at_kill = settled(server.url)
        again = subprocess.run(words, capture_output=True, text=True)
        end = settled(server.url)
        told = [line for line in again.stderr.splitlines() if "was asked" in line]
        third = subprocess.run([*words[:-1], str(place / "bundle-2")], capture_output=True, text=True)
        after = settled(server.url)
        if not killed or again.returncode or third.returncode:
            sys.exit(f"not as meant: killed {killed}\n{again.stderr[-2000:]}\n{third.stderr[-2000:]}")
        asked = end["request_success"] - began
        print(f"records                                   {first}")
        print(f"asked of the judge before SIGKILL         {at_kill['request_success'] - began}")
        print(f"asked by the same command afterwards      {asked - at_kill['request_success'] + began}")
        print(f"together, of which the first is a trial   {asked}")
        print(f"twice: those on their way at the kill     {asked - first - 1} (at most {IN_FLIGHT})")
        print(
            f"asked by a third run                      {after['request_success'] - end['request_success']}"
        )
        print(f"tokens read and written at the judge      {end['prompt_tokens']}, {end['generation_tokens']}")
        print("\n".join(told))


def _first(source: Path, target: Path, most: int) -> int:
    """Copies the first rows of a CSV file; returns how many."""
    from examples.reviews.data import read_csv, write_csv

    rows = read_csv(source)[:most]
    write_csv(target, rows)
    return len(rows)


if __name__ == "__main__":
    main()
