"""A soak: mixed load with aborts for minutes or hours, and what it does to memory, open files, speed and verdicts.

    python -m benchmarks.soak --minutes 60               a server of its own, with the demo's model and bundle
    python -m benchmarks.soak --minutes 40 --tiny DIR    with benchmarks.zoo.calibrated's: many times the requests

Workers ask at random: whole answers, streams, buffered abstentions, several choices, every other route, feedback,
hostile bodies (tests/app/hostile.py), wrong requests, new connections, and streams that they leave after a few tokens
or before the first. Beside them a few fixed prompts are asked again and again. States vary with the batch, so a token
or a verdict near its threshold may fall otherwise now and then: such prompts are listed with how often in each third.
The usual verdict must be the same in the last third as in the first.

Memory is each process's own. Prompts that fill the KV cache come first, so that it is resident before the first
sample. The last two thirds of the requests are cut into ten blocks of as many; memory's growth per request, from the
mean of one block to that of the next, has a mean and Student's interval (blocks that hang together widen it).

Once a minute it says how far it is; an interrupted one shows the figures of the time that it had.

Exits with 1 where a request fails that must not, a usual verdict changes, or places or files do not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import runpy
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.servers import Serving, serving
from benchmarks.zoo import calibrated
from demo.task import made

ROOT = Path(__file__).resolve().parents[1]
FIXED = 8
"""Number of prompts whose verdicts are watched."""

MOST_KIB = 1.0
"""Growth per request at which a soak fails, where its interval is above it."""

STARVED = "the machine gives the engine too little processor time"
"""Begins the message of a server that sheds load: counted as `shed`, which is no failure."""

BLOCKS = 10
STUDENT_T = 2.306
"""95 %, two-sided, for the eight degrees of freedom of nine differences."""

KINDS = {
    "whole": 6,
    "stream": 6,
    "abstain": 3,
    "choices": 1,
    "logprobs": 1,
    "schema": 1,
    "pair": 2,
    "completion": 2,
    "decision": 2,
    "response": 1,
    "message": 1,
    "tokens": 1,
    "feedback": 2,
    "looks": 2,
    "hostile": 3,
    "heavy": 0.3,
    "wrong": 1,
    "new connection": 1,
    "left early": 2,
    "left amid": 3,
}
"""How often each is asked, relative to the others."""

LOOKS = ("/v1/models", "/metrics", "/v1/reliability", "/readyz", "/load", "/openapi.json", "/nowhere")
FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]},
    },
}

Verdict = tuple[float, str, int, str]
Sample = tuple[float, int, Mapping[str, int], int]


@dataclass
class Exchange:
    """The record of a soak. asked: counts by kind and outcome.

    samples: (seconds, requests so far, resident bytes by process, open files of the process that serves HTTP).
    verdicts: for each fixed prompt, every (seconds, region, prediction, answer). answered_at: seconds.
    """

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=lambda: defaultdict(list))
    answered_at: list[float] = field(default_factory=list)


def growth(samples: Sequence[Sample], process: str) -> tuple[float, float] | None:
    """Bytes per request of one process, and half of its 95 % interval; None where a block has no sample."""
    first, last = samples[-1][1] / 3, samples[-1][1]
    blocks: list[list[Sample]] = [[] for _ in range(BLOCKS)]
    for one in samples:
        if one[1] >= first and last:
            blocks[min(BLOCKS - 1, int(BLOCKS * (one[1] - first) / (last - first)))].append(one)
    if not all(blocks):
        return None
    requests = [statistics.fmean(one[1] for one in block) for block in blocks]
    sizes = [statistics.fmean(one[2].get(process, 0) for one in block) for block in blocks]
    slopes = [(sizes[n + 1] - sizes[n]) / max(1.0, requests[n + 1] - requests[n]) for n in range(BLOCKS - 1)]
    return statistics.fmean(slopes), STUDENT_T * statistics.stdev(slopes) / math.sqrt(len(slopes))


class Soak:
    def __init__(
        self, server: Serving, prompts: Sequence[str], seconds: float, workers: int, seed: int
    ) -> None:
        self._server = server
        self._prompts = prompts
        self._workers = workers
        self._random = random.Random(seed)
        self._start = time.monotonic()
        self._seconds = seconds
        self.record = Exchange()
        corpus = runpy.run_path(str(ROOT / "tests/app/hostile.py"))
        self._hostile = [(one.path, one.body) for one in (*corpus["BROKEN"], *corpus["WRONG"])]
        self._heavy = [(one.path, one.body) for one in corpus["HEAVY"]]
        self._given: list[str] = []  # ids of answers that feedback may name

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._workers)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=300, limits=limits) as client:
            self._model = (await client.get("/v1/models")).json()["data"][0]["id"]
            await self._touch_cache(client)
            self._start = time.monotonic()
            work = [self._work(client) for _ in range(self._workers)]
            await asyncio.gather(*work, self._watch_verdicts(client), self._sample(), self._tell())
            for _ in range(300):
                if (await client.get("/load")).json()["server_load"] == 0:
                    break
                await asyncio.sleep(0.2)
            else:
                self.record.asked["end", "places are still taken"] += 1
        await asyncio.sleep(6)  # uvicorn closes idle connections after 5
        self._note_sample()

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    async def _work(self, client: httpx.AsyncClient) -> None:
        while self._elapsed < self._seconds:
            [kind] = self._random.choices(list(KINDS), list(KINDS.values()))
            try:
                outcome = await self._ask(client, kind, self._random.choice(self._prompts))
            except httpx.TransportError as error:
                outcome = type(error).__name__
                await asyncio.sleep(0.5)
            self.record.asked[kind, "shed" if outcome == "503" else outcome] += 1
            if outcome == "200" and kind not in ("looks", "tokens", "feedback", "hostile", "heavy"):
                self.record.answered_at.append(self._elapsed)

    async def _touch_cache(self, client: httpx.AsyncClient) -> None:
        """Asks with long prompts that have nothing in common until twice the cache was used."""
        longest = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        metrics = (await client.get("/metrics")).text
        told = {
            name: int(re.findall(f'{name}="(\\d+)"', metrics)[0]) for name in ("num_gpu_blocks", "block_size")
        }
        tokens = told["num_gpu_blocks"] * told["block_size"]

        async def one() -> None:
            ids = [self._random.randrange(100, 400) for _ in range(longest - 40)]
            await client.post(
                "/v1/completions", json={"model": self._model, "prompt": ids, "max_tokens": 2}, timeout=300
            )

        for _ in range(-(-2 * tokens // (longest * 8))):
            await asyncio.gather(*(one() for _ in range(8)))

    async def _ask(self, client: httpx.AsyncClient, kind: str, prompt: str) -> str:
        body, path = self._body(prompt), "/v1/chat/completions"
        match kind:
            case "pair":
                path, body = "/v1/reliability", body | {"response": "<sentence>No idea.</sentence>"}
            case "completion":
                path, body = "/v1/completions", {"model": self._model, "prompt": prompt, "max_tokens": 16}
            case "decision":
                asked = [{"type": "predicate", "instructions": "Is it so?"}]
                path, body = "/v1/decisions", {"model": self._model, "input": prompt, "questions": asked}
            case "response":
                path, body = "/v1/responses", {"model": self._model, "input": prompt, "store": False}
            case "message":
                path, body = "/v1/messages", body | {"max_tokens": 16}
            case "tokens":
                path, body = "/tokenize", {"model": self._model, "prompt": prompt}
            case "feedback":
                told = self._given.pop() if self._given else "nobody's"
                path, body = "/v1/reliability/feedback", {"id": told, "correct": True}
            case "looks":
                return str((await client.get(self._random.choice(LOOKS))).status_code)
            case "hostile" | "heavy":
                path, content = self._random.choice(self._hostile if kind == "hostile" else self._heavy)
                content = content.replace(b'"tiny"', json.dumps(self._model).encode())
                sent = await client.post(path, content=content, headers={"content-type": "application/json"})
                return str(sent.status_code)
            case "new connection":
                async with httpx.AsyncClient(base_url=self._server.url, timeout=300, verify=False) as other:
                    return str((await other.post(path, json=body)).status_code)
            case "wrong":
                body |= {"n": "two"}
            case "choices":
                body |= {"n": 3, "temperature": 0.8, "seed": self._random.randrange(1000)}
            case "logprobs":
                body |= {"logprobs": True, "top_logprobs": 5}
            case "schema":
                body |= {"response_format": FORMAT}
            case "abstain":
                body |= {"stream": True, "reliability": {"mode": "abstain"}}
            case "left early":
                try:
                    await client.post(path, json=body, timeout=0.05)
                except httpx.TimeoutException:
                    return "left"
                return "200"
        if kind not in ("stream", "left amid"):
            response = await client.post(path, json=body)
            if kind == "whole" and response.is_success and len(self._given) < 100:
                self._given.append(response.json()["id"])
            return str(response.status_code)
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            count, last = 0, ""
            async for line in response.aiter_lines():
                count, last = count + 1, line or last
                if kind == "left amid" and count > self._random.randrange(12):
                    return "left"
            if STARVED in last:
                return "503"
            return str(response.status_code) if last == "data: [DONE]" else f"ended with {last[:80]!r}"

    async def _watch_verdicts(self, client: httpx.AsyncClient) -> None:
        while self._elapsed < self._seconds:
            for prompt in self._prompts[:FIXED]:
                try:
                    response = await client.post("/v1/chat/completions", json=self._body(prompt))
                except httpx.TransportError as error:
                    self.record.asked["fixed", type(error).__name__] += 1
                    break
                outcome = str(response.status_code)
                self.record.asked["fixed", "shed" if outcome == "503" else outcome] += 1
                if response.is_success:
                    found = response.json()
                    [verdict] = found["reliability"]["results"]
                    text = found["choices"][0]["message"]["content"]
                    self.record.verdicts[prompt].append(
                        (self._elapsed, verdict["region"], verdict["prediction"], text)
                    )
            await asyncio.sleep(1)

    async def _sample(self) -> None:
        while self._elapsed < self._seconds:
            self._note_sample()
            await asyncio.sleep(min(5.0, self._seconds / 20))

    async def _tell(self) -> None:
        while self._elapsed < self._seconds:
            await asyncio.sleep(min(60.0, self._seconds - self._elapsed + 0.1))
            *_, sizes, files = self.record.samples[-1]
            memory = ", ".join(f"{name} {size >> 10} KiB" for name, size in sizes.items())
            print(
                f"{self._elapsed / 60:.1f} min: {sum(self.record.asked.values())} requests, "
                f"{len(self.record.answered_at)} answers, memory: {memory}; files {files}",
                file=sys.stderr,
                flush=True,
            )

    def _note_sample(self) -> None:
        asked = sum(self.record.asked.values())
        self.record.samples.append(
            (self._elapsed, asked, self._server.memory_by_process(), self._server.files())
        )

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": prompt}]}


def by_thirds(seen: Sequence[Verdict], seconds: float) -> dict[tuple[str, int, str], list[int]]:
    """The count of each (region, prediction, answer) in the first, the second and the last third."""
    counts: dict[tuple[str, int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for at, region, prediction, text in seen:
        counts[region, prediction, text][min(2, int(3 * at / seconds))] += 1
    return dict(counts)


def usual(seen: Sequence[Verdict]) -> tuple[str, int] | None:
    """The most frequent (region, prediction)."""
    counts = Counter((region, prediction) for _, region, prediction, _ in seen)
    return counts.most_common(1)[0][0] if counts else None


def summary(record: Exchange, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """The figures, and a list of failures."""
    third = seconds / 3
    early, late = (
        sum(low <= at < low + third for at in record.answered_at) / third for low in (0.0, 2 * third)
    )
    first, last = record.samples[0], record.samples[-1]
    varied = {
        prompt: counts
        for prompt, seen in record.verdicts.items()
        if len(counts := by_thirds(seen, seconds)) > 1
    }
    changed = []
    for prompt, seen in record.verdicts.items():
        begin = usual([one for one in seen if one[0] < third])
        end = usual([one for one in seen if one[0] >= 2 * third])
        if begin and end and begin != end:
            changed.append(f"the verdict changed from {begin} to {end}: {prompt!a}")
    refused = {"200", "400", "404", "413", "422"}
    fine = {"wrong": {"400"}, "hostile": refused, "heavy": refused, "looks": {"200", "404"}}
    fine["feedback"] = {"200", "404", "409"}
    failed = {
        f"{kind}: {outcome}": count
        for (kind, outcome), count in record.asked.items()
        if outcome not in fine.get(kind, {"200", "left"}) | {"shed"}
    }
    memory, leaks = {}, []
    for process in first[2]:
        sizes = [one[2].get(process, 0) / 2**20 for one in record.samples]
        memory[process] = dict(
            zip(("mib_first", "mib_last", "mib_most"), (sizes[0], sizes[-1], max(sizes)), strict=True)
        )
        if grown := growth(record.samples, process):
            kib, half = grown[0] / 1024, grown[1] / 1024
            memory[process] |= {
                "kib_per_request": kib,
                "interval_from": kib - half,
                "interval_to": kib + half,
            }
            if kib - half > MOST_KIB:
                leaks.append(f"{process} grows by {kib:.2f} KiB a request")
    figures = {
        "minutes": round(seconds / 60, 2),
        "requests": sum(record.asked.values()),
        "asked": {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(record.asked.items())},
        "answers_per_s_first_third": round(early, 2),
        "answers_per_s_last_third": round(late, 2),
        "memory": memory,
        "files_first": first[3],
        "files_last": last[3],
        "fixed_prompts_asked": sum(map(len, record.verdicts.values())),
        "usual_verdicts_that_changed": len(changed),
        "fixed_prompts_that_varied": {
            prompt: {str(verdict): n for verdict, n in counts.items()} for prompt, counts in varied.items()
        },
        "failed": failed,
    }
    faults = [f"{count} requests failed, {what}" for what, count in failed.items()]
    faults += changed
    if last[3] > first[3] + 5:
        faults.append(f"files stay open: {first[3]} -> {last[3]}")
    faults += leaks
    return figures, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / "var/models/smollm2-135m-word-ordering")
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo/bundle")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with messages; default: the demo's test set")
    parser.add_argument(
        "--tiny", type=Path, help="folder of benchmarks.zoo.calibrated; made where it is not there"
    )
    parser.add_argument("--samples", type=Path, help="file for the samples, one JSON array each")
    given = parser.parse_args()
    settings = {}
    if given.tiny:
        given.model, given.bundle = calibrated.calibrated(given.tiny)
        prompts = [calibrated.prompt(n) for n in range(2000)]
        settings = {
            "CANDOR_EAGER": "true",
            "CANDOR_MAX_MODEL_LEN": "1024",
            "CANDOR_KV_CACHE_BYTES": str(1 << 25),
        }
    else:
        lines = (given.prompts or made("test")).read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    store = tempfile.TemporaryDirectory()
    settings["CANDOR_STORE"] = f"{store.name}/verdicts.db"
    with store, serving(given.model, given.bundle, settings) as server:
        soak = Soak(server, prompts, given.minutes * 60, given.workers, given.seed)
        with suppress(KeyboardInterrupt):
            asyncio.run(soak.run())
        seconds = min(given.minutes * 60, soak.record.samples[-1][0])
        figures, faults = summary(soak.record, seconds)
    if given.samples:
        given.samples.write_text("".join(json.dumps(one) + "\n" for one in soak.record.samples))
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
