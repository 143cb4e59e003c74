"""Verdict stability: are the same prompts judged the same, however they are asked?

    python -m benchmarks.stability --prompts 500

    alone, cold       one after the other, nothing in the prefix cache       the yardstick
    alone, cached     the same again: each prompt lies in the prefix cache
    streamed          the same, streamed
    32, cached        32 at once, prompts in the cache
    32, cold          32 at once on a new server

States in bfloat16 vary with the batch, so a verdict near a threshold may differ; every row that does is listed with
both readings, and how far its q' stands from the threshold. Whether the answer itself differed is said too: a token
that falls the other way makes another answer, which is rightly judged by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.servers import serving
from demo.task import made

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


async def ask(client: httpx.AsyncClient, model: str, prompt: str, *, stream: bool = False) -> Row:
    """The answer's text and its reading."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    if stream:
        lines = [
            line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: {")
        ]
        chunks = [json.loads(line) for line in lines]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        return {"text": text, **chunks[-1]["reliability"]["results"][0]}
    found = response.json()
    return {"text": found["choices"][0]["message"]["content"], **found["reliability"]["results"][0]}


async def ask_all(url: str, prompts: Sequence[str], at_once: int, *, stream: bool = False) -> list[Row]:
    """Asks in batches; the next begins when all of the last are answered."""
    rows: list[Row] = []
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for begin in range(0, len(prompts), at_once):
            batch = prompts[begin : begin + at_once]
            rows += await asyncio.gather(*(ask(client, model, one, stream=stream) for one in batch))
    seconds = time.monotonic() - began
    print(f"{len(rows)} prompts, {at_once} at once, {stream=}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def differences(yardstick: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """The number of verdicts that differ, and each of them."""
    differing = [
        {
            "prompt": index,
            "another_answer": one["text"] != other["text"],
            **{
                name: [one[name], other[name]]
                for name in ("region", "reason", "prediction", "rescaled_similarity", "probability")
            },
        }
        for index, (one, other) in enumerate(zip(yardstick, rows, strict=True))
        if (one["region"], one["prediction"], one["abstained"])
        != (other["region"], other["prediction"], other["abstained"])
    ]
    return {
        "verdicts_that_differ": len(differing),
        "of_the_same_answer": sum(not row["another_answer"] for row in differing),
        "answers_that_differ": sum(a["text"] != b["text"] for a, b in zip(yardstick, rows, strict=True)),
        "differing": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--model", type=Path, default=ROOT / "var/models/smollm2-135m-word-ordering")
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo/bundle")
    parser.add_argument("--data", type=Path, help="JSON Lines with messages; default: the demo's test set")
    parser.add_argument("--same", action="store_true", help="end with code 1 if a verdict differs")
    given = parser.parse_args()
    lines = (given.data or made("test")).read_text(encoding="utf-8").splitlines()[: given.prompts]
    prompts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    with serving(given.model, given.bundle) as server:
        yardstick = asyncio.run(ask_all(server.url, prompts, 1))
        ways = {
            "alone, cached": asyncio.run(ask_all(server.url, prompts, 1)),
            "streamed": asyncio.run(ask_all(server.url, prompts, 1, stream=True)),
            "32, cached": asyncio.run(ask_all(server.url, prompts, 32)),
        }
    with serving(given.model, given.bundle) as server:
        ways["32, cold"] = asyncio.run(ask_all(server.url, prompts, 32))
    report = {way: differences(yardstick, rows) for way, rows in ways.items()}
    regions = {region: sum(row["region"] == region for row in yardstick) for region in ("high", "low", "ood")}
    print(json.dumps({"prompts": len(prompts), "regions": regions, **report}, indent=2, ensure_ascii=False))
    if given.same and any(found["verdicts_that_differ"] for found in report.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
