"""A soak: mixed load with aborts for minutes or hours, and what it does to memory, open files, speed and verdicts.

    python -m benchmarks.soak --minutes 60        a server of its own, with the demo's model and bundle

Workers ask at random: whole answers, streams, buffered abstentions, several choices, given pairs, wrong requests, and
streams that they leave after a few tokens or before the first. Beside them a few fixed prompts are asked again and
again. States vary with the batch, so a token or a verdict near its threshold may fall otherwise now and then: such
prompts are listed with how often in each third. The usual verdict must be the same in the last third as in the first.

    slope = sum (t - mean t)(m - mean m) / sum (t - mean t)^2       memory m at times t of the last two thirds

Once a minute it says how far it is; an interrupted one shows the figures of the time that it had.

Exits with 1 where a request fails that must not, a usual verdict changes, or places or files do not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.servers import Serving, serving
from demo.task import made

ROOT = Path(__file__).resolve().parents[1]
FIXED = 8
"""Number of prompts whose verdicts are watched."""

KINDS = ("whole", "stream", "abstain", "choices", "pair", "wrong", "left early", "left amid")
WEIGHTS = (6, 6, 3, 1, 2, 1, 2, 3)

Verdict = tuple[float, str, int, str]


@dataclass
class Exchange:
    """The record of a soak. asked: counts by kind and outcome. samples: (seconds, resident bytes, open files).

    verdicts: for each fixed prompt, every (seconds, region, prediction, answer). answered_at: seconds.
    """

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=lambda: defaultdict(list))
    answered_at: list[float] = field(default_factory=list)


def slope_per_hour(samples: Sequence[tuple[float, int, int]]) -> float:
    """Bytes per hour, by least squares over the last two thirds; 0 for fewer than two samples."""
    late = samples[len(samples) // 3 :]
    if len(late) < 2:
        return 0.0
    times, sizes = [one[0] for one in late], [one[1] for one in late]
    middle, mean = sum(times) / len(late), sum(sizes) / len(late)
    above = sum((t - middle) * (m - mean) for t, m in zip(times, sizes, strict=True))
    return 3600 * above / sum((t - middle) ** 2 for t in times)


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

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._workers)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=300, limits=limits) as client:
            self._model = (await client.get("/v1/models")).json()["data"][0]["id"]
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
            [kind] = self._random.choices(KINDS, WEIGHTS)
            try:
                outcome = await self._ask(client, kind, self._random.choice(self._prompts))
            except httpx.TransportError as error:
                outcome = type(error).__name__
                await asyncio.sleep(0.5)
            self.record.asked[kind, outcome] += 1
            if outcome == "200" and not kind.startswith(("left", "wrong")):
                self.record.answered_at.append(self._elapsed)

    async def _ask(self, client: httpx.AsyncClient, kind: str, prompt: str) -> str:
        body = self._body(prompt)
        match kind:
            case "pair":
                body |= {"response": "<sentence>No idea.</sentence>"}
                return str((await client.post("/v1/reliability", json=body)).status_code)
            case "wrong":
                return str((await client.post("/v1/chat/completions", json=body | {"n": "two"})).status_code)
            case "choices":
                body |= {"n": 3, "temperature": 0.8, "seed": self._random.randrange(1000)}
            case "abstain":
                body |= {"stream": True, "reliability": {"mode": "abstain"}}
            case "left early":
                try:
                    await client.post("/v1/chat/completions", json=body, timeout=0.05)
                except httpx.TimeoutException:
                    return "left"
                return "200"
        if kind not in ("stream", "left amid"):
            return str((await client.post("/v1/chat/completions", json=body)).status_code)
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            count, last = 0, ""
            async for line in response.aiter_lines():
                count, last = count + 1, line or last
                if kind == "left amid" and count > self._random.randrange(12):
                    return "left"
            return str(response.status_code) if last == "data: [DONE]" else f"ended with {last[:80]!r}"

    async def _watch_verdicts(self, client: httpx.AsyncClient) -> None:
        while self._elapsed < self._seconds:
            for prompt in self._prompts[:FIXED]:
                try:
                    response = await client.post("/v1/chat/completions", json=self._body(prompt))
                except httpx.TransportError as error:
                    self.record.asked["fixed", type(error).__name__] += 1
                    break
                self.record.asked["fixed", str(response.status_code)] += 1
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
            _, memory, files = self.record.samples[-1]
            print(
                f"{self._elapsed / 60:.1f} min: {sum(self.record.asked.values())} requests, "
                f"{len(self.record.answered_at)} answers, memory {memory >> 20} MiB, files {files}",
                file=sys.stderr,
                flush=True,
            )

    def _note_sample(self) -> None:
        self.record.samples.append((self._elapsed, self._server.memory(), self._server.files()))

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
    fine = {"200", "left"}
    failed = {
        f"{kind}: {outcome}": count
        for (kind, outcome), count in record.asked.items()
        if outcome not in (fine if kind != "wrong" else {"400"})
    }
    figures = {
        "minutes": round(seconds / 60, 2),
        "requests": sum(record.asked.values()),
        "asked": {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(record.asked.items())},
        "answers_per_s_first_third": round(early, 2),
        "answers_per_s_last_third": round(late, 2),
        "memory_mib_first": first[1] >> 20,
        "memory_mib_last": last[1] >> 20,
        "memory_mib_most": max(one[1] for one in record.samples) >> 20,
        "memory_mib_per_hour": round(slope_per_hour(record.samples) / (1 << 20), 1),
        "files_first": first[2],
        "files_last": last[2],
        "fixed_prompts_asked": sum(map(len, record.verdicts.values())),
        "usual_verdicts_that_changed": len(changed),
        "fixed_prompts_that_varied": {
            prompt: {str(verdict): n for verdict, n in counts.items()} for prompt, counts in varied.items()
        },
        "failed": failed,
    }
    faults = [f"{count} requests failed, {what}" for what, count in failed.items()]
    faults += changed
    if last[2] > first[2] + 5:
        faults.append(f"files stay open: {first[2]} -> {last[2]}")
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
    given = parser.parse_args()
    lines = (given.prompts or made("test")).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    with serving(given.model, given.bundle) as server:
        soak = Soak(server, prompts, given.minutes * 60, given.workers, given.seed)
        with suppress(KeyboardInterrupt):
            asyncio.run(soak.run())
        seconds = min(given.minutes * 60, soak.record.samples[-1][0])
        figures, faults = summary(soak.record, seconds)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
