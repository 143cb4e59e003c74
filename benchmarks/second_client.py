"""Candor and vLLM's own server under a load generator that neither wrote: NVIDIA's AIPerf, with its own defaults.

    python -m venv V; V/bin/pip install aiperf          it does not install beside vLLM
    python -m benchmarks.second_client V/bin/aiperf --model M --bundle B

Both servers run at once with the settings of `benchmarks.serving`; they are asked in turn, first the one, then the
other, then the other way round. AIPerf makes the prompts (random words, 550 tokens) and leaves the answers' length
to the server, so both are told the same most tokens. It counts an answer without text as a failure, so the demo's
model, which answers such prompts with its tag alone, is none to ask.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.servers import Serving
from benchmarks.serving import NAME, both

COLUMNS = {
    "requests a second": "request_throughput",
    "first token, ms": "time_to_first_token",
    "between tokens, ms": "inter_token_latency",
    "whole answer, ms": "request_latency",
    "tokens an answer": "output_sequence_length",
}


def ask(
    client: Path, model: Path, server: Serving, requests: int, concurrency: int, most: int, seed: int
) -> dict[str, Any]:
    """Returns AIPerf's figures of one run. Raises RuntimeError if a request failed."""
    with tempfile.TemporaryDirectory() as place:
        command = [str(client), "profile", "--model", NAME, "--url", server.url, "--endpoint-type", "chat"]
        command += ["--streaming", "--tokenizer", str(model), "--request-count", str(requests)]
        command += ["--concurrency", str(concurrency), "--extra-inputs", f"max_tokens:{most}"]
        command += ["--random-seed", str(seed), "--ui", "none", "--artifact-dir", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = next(Path(place).rglob("profile_export_aiperf.json"), None)
        if done.returncode or found is None:
            raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
        figures: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    if figures["request_count"]["avg"] != requests:
        raise RuntimeError(
            f"{figures['request_count']} of {requests} requests: {figures.get('error_summary')}"
        )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("client", type=Path, help="the command aiperf")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--most", type=int, default=32, help="tokens an answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="neither server compiles")
    given = parser.parse_args()
    client = given.client.absolute()
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with both(given.model, given.bundle, given.eager) as (candor, plain):
        for number in range(given.rounds + 1):  # the first warms up
            found = {
                server.pid: ask(
                    client, given.model, server, given.requests, given.concurrency, given.most, number
                )
                for server in ((candor, plain) if number % 2 else (plain, candor))
            }
            if number:
                rounds.append((found[candor.pid], found[plain.pid]))
            print(f"round {number}", file=sys.stderr)
    print("| AIPerf, medians of its averages | Candor | vLLM | ratio |\n|---|---|---|---|")
    for name, key in COLUMNS.items():
        ours, theirs = (median(pair[side][key]["avg"] for pair in rounds) for side in (0, 1))
        ratio = median(one[key]["avg"] / other[key]["avg"] for one, other in rounds)
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
