"""From 1 to 1,000 replicas on paper: a discrete-event model, fed with measured times, checked on real replicas.

    python -m benchmarks.fleet measure --page replicas.txt --out parts.json
    python -m benchmarks.fleet simulate --parts parts.json --replicas replicas.json

replicas.json is what `python -m benchmarks.replicas` writes. The model:

    request -> ingress (a queue) -> prefix tree (one queue for all) -> a replica -> batch after batch -> answer

A replica works in rounds: what came since the last is prefilled, as far as its prefix is not in the cache, then every
running answer gets STEPS tokens.

    round(u, b) = u prefill + STEPS (step + each b)     u tokens to prefill, b answers running, seconds

A stranger is refused when its prefill ends. Nobody waits for the store, so it only has to keep pace; the same holds
of Prometheus and of those who label audits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import runpy
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
SHARED, GROUPS = 400, 400
"""Tokens that prompts of one of so many groups begin with, in the cases with shared prefixes."""
FLEETS = (1, 2, 3, 10, 30, 100, 300, 1000)
PRICE = 0.04
"""Dollars for an hour of one processor core: the one figure here that is assumed and not measured."""
LABELS_PER_HOUR = 180
"""Of one reviewer, at one in 20 s; assumed."""
SCRAPED_EVERY_S, AUDITED = 15.0, 0.05
EXCHANGES_PER_S, BEATS_PER_S = 4.0, 1.0  # candor.app.process.replicas


@dataclass(frozen=True)
class Times:
    """Seconds. prefill: a token. step, each: of a decoding step, and for each answer in it. ingress, tree: a request.
    row, exchange, beat: of the store's one core, for a verdict and for each transaction. page: to merge one replica's
    metrics."""

    prefill: float
    step: float
    each: float
    ingress: float
    tree: float
    row: float
    exchange: float
    beat: float
    page: float
    series: int


@dataclass(frozen=True)
class Traffic:
    """own, shared: tokens of a prompt that are its own, and that it shares with others of its group. answers: tokens
    of answers, each as frequent as the others. cached: shared prefixes that a replica's cache holds. strangers: their
    share."""

    own: int
    answers: tuple[int, ...]
    shared: int = 0
    groups: int = 1
    cached: int = 20
    strangers: float = 0.0


@dataclass
class Seen:
    """answered, refused: seconds that each took. hits: prompts whose shared part was in the cache, of `asked`."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    hits: int = 0
    asked: int = 0


class Replica:
    """One engine. load: answers that wait or run."""

    def __init__(self, env: simpy.Environment, times: Times, traffic: Traffic, seen: Seen) -> None:
        self.env, self.times, self.traffic, self.seen = env, times, traffic, seen
        self.load = 0
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.came: list[tuple[int, int, simpy.Event]] = []
        self.running: list[tuple[int, simpy.Event]] = []
        self.wake = env.event()
        env.process(self.work())

    def take(self, group: int, answer: int) -> simpy.Event:
        """answer: its tokens; a stranger's has none."""
        done = self.env.event()
        self.load += 1
        self.came.append((group, answer, done))
        if not self.wake.triggered:
            self.wake.succeed()
        return done

    def work(self) -> Iterator[simpy.Event]:
        times, traffic = self.times, self.traffic
        while True:
            if not (self.came or self.running):
                self.wake = self.env.event()
                yield self.wake
            room = 64 - len(self.running)
            new, self.came = self.came[:room], self.came[room:]
            tokens = sum(traffic.own + self.uncached(group) for group, _, _ in new)
            self.running += [(answer, done) for _, answer, done in new if answer]
            took = tokens * times.prefill
            took += STEPS * (times.step + times.each * len(self.running)) if self.running else 0.0
            yield self.env.timeout(took)
            for _, answer, done in new:
                if not answer:
                    self.end(done)
            left = [(tokens - STEPS, done) for tokens, done in self.running]
            for tokens, done in left:
                if tokens <= 0:
                    self.end(done)
            self.running = [(tokens, done) for tokens, done in left if tokens > 0]

    def uncached(self, group: int) -> int:
        self.seen.asked += 1
        if self.traffic.shared and group in self.cache:
            self.cache.move_to_end(group)
            self.seen.hits += 1
            return 0
        self.cache[group] = None
        if len(self.cache) > self.traffic.cached:
            self.cache.popitem(last=False)
        return self.traffic.shared

    def end(self, done: simpy.Event) -> None:
        self.load -= 1
        done.succeed()


def simulate(
    times: Times,
    traffic: Traffic,
    replicas: int,
    clients: int,
    *,
    prefix: bool,
    ingresses: int,
    seconds: float,
) -> dict[str, float]:
    """`clients` ask, each again as soon as it has its answer, as benchmarks.replicas does. What ends in the first
    third is not counted."""
    draw, env, seen = random.Random(1), simpy.Environment(), Seen()
    fleet = [Replica(env, times, traffic, seen) for _ in range(replicas)]
    ingress, tree = simpy.Resource(env, ingresses), simpy.Resource(env, 1)
    homes: dict[int, Replica] = {}

    def chosen(group: int) -> Replica:
        one, two = draw.choice(fleet), draw.choice(fleet)
        lighter = one if one.load <= two.load else two
        if not prefix:
            return lighter
        home = homes.setdefault(group, lighter)
        if home.load - lighter.load > 8:  # as the deployment has it: a home that is busier gives way
            homes[group] = home = lighter
        return home

    def client() -> Iterator[simpy.Event]:
        yield env.timeout(draw.random())
        while True:
            came, group, stranger = env.now, draw.randrange(traffic.groups), draw.random() < traffic.strangers
            with ingress.request() as mine:
                yield mine
                yield env.timeout(draw.expovariate(1 / times.ingress))
            if prefix:
                with tree.request() as mine:
                    yield mine
                    yield env.timeout(times.tree)
            yield chosen(group).take(group, 0 if stranger else draw.choice(traffic.answers))
            if env.now >= seconds / 3:
                (seen.refused if stranger else seen.answered).append(env.now - came)

    for _ in range(clients):
        env.process(client())
    env.run(seconds)
    return figures(seen, replicas, seconds)


def figures(seen: Seen, replicas: int, seconds: float) -> dict[str, float]:
    waited = sorted(seen.answered) or [math.nan]
    requests = (len(seen.answered) + len(seen.refused)) / (seconds * 2 / 3)
    return {
        "requests_per_s": requests,
        "answers_per_s": len(seen.answered) / (seconds * 2 / 3),
        "p50_s": waited[len(waited) // 2],
        "p95_s": waited[len(waited) * 95 // 100],
        "p99_s": waited[len(waited) * 99 // 100],
        "hits": seen.hits / max(1, seen.asked),
        "dollars_per_million": replicas * PRICE / 3600 / requests * 1e6,
    }


def shared_parts(times: Times, requests: float, replicas: int) -> dict[str, float]:
    """How many of each part that all replicas share it takes to keep pace: processes, millions of series, people.

    requests: in a second.
    """
    return {
        "ingresses": requests * times.ingress,
        "prefix_trees": requests * times.tree,
        "cores_of_the_store": requests * times.row
        + replicas * (EXCHANGES_PER_S * times.exchange + BEATS_PER_S * times.beat),
        "merging_of_metrics": replicas * times.page / SCRAPED_EVERY_S,
        "millions_of_series": replicas * times.series / 1e6,
        "reviewers": requests * AUDITED * 3600 / LABELS_PER_HOUR,
    }


def measure(out: Path, page: Path) -> None:
    """Times the store, the tree and the page with what is installed; no model is needed. page: of one replica."""
    out.write_text(
        json.dumps({**_store_times(), **_tree_times(), **_page_times(page.read_text())}, indent=2) + "\n"
    )
    print(out.read_text())


def _mean_s(work: Any, seconds: float = 1.0) -> float:
    work()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        count += 1
    return (time.perf_counter() - began) / count


def _store_times() -> dict[str, float]:
    import psutil

    from candor.app.process.promoted import Located
    from candor.app.store import together
    from candor.app.store.database import Database

    made = runpy.run_path(str(ROOT / "tests/app/postgres.py"))
    with made["running"]() as postgres:
        database = Database.open(postgres.database())

        def spent() -> float:
            leader = psutil.Process(postgres.process.pid)
            times = [one.cpu_times() for one in (leader, *leader.children(recursive=True))]
            return float(sum(one.user + one.system for one in times))

        def on_server(work: Any, items: int = 1) -> float:
            """Processor seconds of PostgreSQL for each item."""
            before, count = spent(), 0
            end = time.perf_counter() + 1.5
            while time.perf_counter() < end:
                work()
                count += items
            return (spent() - before) / count

        def exchange() -> None:
            with database.changing() as connection:
                connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
                together.take(connection, together.Taken("tokens", 60_000, {f"k{n}": 1.0 for n in range(5)}))
                together.use(connection, {(f"k{n}", 1): 1 for n in range(5)})

        def beat() -> None:
            with database.changing() as connection:
                together.beat(connection, "r", [together.Beat("tiny", "d")])

        number = 0

        def rows() -> None:
            nonlocal number
            entries = []
            for _ in range(16):
                number += 1
                entries.append(("verdicts", _row(f"id-{number}")))
            database.write(entries)

        with database.changing() as connection:
            together.begin(connection, "tiny", Located("/b", "d"))
        found = {
            "exchange_wall_s": _mean_s(exchange),
            "beat_wall_s": _mean_s(beat),
            "exchange": on_server(exchange),
            "beat": on_server(beat),
            "row": on_server(rows, 16),
        }
        database.close()
        return found


def _row(id: str) -> dict[str, Any]:
    figures = dict.fromkeys(
        (
            "probability",
            "score",
            "prompt_p_value",
            "sdm_probability",
            "rescaled_similarity",
            "distance_quantile",
        ),
        0.5,
    )
    return {
        **figures,
        **{"id": id, "choice": 0, "time": time.time(), "kind": "answer", "model": "m", "bundle": "d" * 64},
        **{"rule": "two-gates", "estimator": None, "alpha": 0.9, "region": "high", "reason": None},
        **{"abstained": False, "calibrated": True, "covered": True, "accuracy": 0.9, "confidence": 0.95},
        **{"prediction": 1, "similarity": 5, "caller": "anyone"},
        **{"audit_probability": 0.05, "audit_least": 0.05, "drawn": False},
    }


def _tree_times() -> dict[str, float]:
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

    tree, draw = PrefixTree(), random.Random(1)
    tenants = [f"replica-{n}" for n in range(100)]
    tree.add_tenants(tenants, 0.0)
    shared = ["".join(draw.choices("abcdefgh ", k=2400)) for _ in range(400)]
    at = 0

    def one() -> None:
        nonlocal at
        at += 1
        text = shared[draw.randrange(400)] + "".join(draw.choices("abcdefgh ", k=180))
        tree.prefix_match(text, tenants)
        tree.insert(text, draw.choice(tenants), float(at))

    return {"tree": _mean_s(one, 2.0)}


def _page_times(page: str) -> dict[str, Any]:
    from candor.app.process.cluster import merged

    pages = {f"r{n}": page for n in range(20)}
    series = sum(1 for line in page.splitlines() if line and not line.startswith("#"))
    return {"page": _mean_s(lambda: merged(pages), 2.0) / 20, "series": series}


def service_times(found: dict[str, Any]) -> tuple[float, float, float]:
    """Returns prefill, step and each, from what one replica answered with several numbers of clients.

    found: "answers_per_s" by clients, "prefill_s_per_token", "answer_tokens" and "prompt_tokens"; or "step" and
    "each" themselves.
    """
    if "step" in found:
        return float(found["prefill_s_per_token"]), float(found["step"]), float(found["each"])
    prefill = float(found["prefill_s_per_token"])
    rounds = {
        int(n): int(n) / rate for n, rate in found["answers_per_s"].items()
    }  # seconds of an answer, n at once
    tokens = statistics.mean(found["answer_tokens"])
    own = float(found["prompt_tokens"])
    per_token = {n: max(1e-6, (wait - own * prefill * n) / tokens) for n, wait in rounds.items()}
    slope, intercept = statistics.linear_regression(list(per_token), list(per_token.values()))
    return prefill, max(1e-6, intercept), max(0.0, slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "simulate"])
    parser.add_argument("--out", type=Path, default=Path("parts.json"))
    parser.add_argument("--page", type=Path, help="metrics of one replica, as benchmarks.replicas keeps them")
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--replicas", type=Path)
    parser.add_argument("--fleets", type=int, nargs="+", default=FLEETS)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.out, given.page)
        return
    parts = json.loads(given.parts.read_text())
    real = json.loads(given.replicas.read_text())
    print(json.dumps(report(parts, real, given.fleets, given.seconds), indent=2))


def report(
    parts: dict[str, Any], real: dict[str, Any], fleets: Sequence[int], seconds: float
) -> dict[str, Any]:
    prefill, step, each = service_times(real["service"])
    one = real["throughput"]["1"]["cpu_s_per_answer_of"]
    times = Times(
        prefill,
        step,
        each,
        ingress=one["ingress"],
        tree=one.get(
            "prefix_tree", parts["tree"]
        ),  # with --routing prefix: its process's, with what Ray takes
        **{name: parts[name] for name in ("row", "exchange", "beat", "page", "series")},
    )
    alone = Traffic(round(real["service"]["prompt_tokens"]), tuple(real["service"]["answer_tokens"]))
    check = {}
    for replicas, measured in real["throughput"].items():
        # They share two cores: with n replicas each step of one takes n times as long.
        n = int(replicas)
        slower = replace(times, prefill=prefill * n, step=step * n, each=each * n)
        model = simulate(slower, alone, n, 8, prefix=False, ingresses=2, seconds=300)
        check[replicas] = {
            which: {name: found[name] for name in ("answers_per_s", "p50_s", "p95_s")}
            for which, found in (("measured", measured), ("model", model))
        }
    table = []
    for shared, groups, strangers, prefix in (
        (0, 1, 0.0, False),
        (0, 1, 0.3, False),
        (SHARED, GROUPS, 0.0, False),
        (SHARED, GROUPS, 0.0, True),
        (SHARED, GROUPS, 0.3, True),
    ):
        traffic = replace(alone, shared=shared, groups=groups, strangers=strangers)
        for replicas in fleets:
            ingresses = max(2, math.ceil(replicas * 8 * times.ingress / 0.5))
            run = simulate(
                times,
                traffic,
                replicas,
                16 * replicas,
                prefix=prefix,
                ingresses=ingresses,
                seconds=min(seconds, max(24.0, 3000 / replicas)),  # several times what an answer takes
            )
            needed = shared_parts(times, run["requests_per_s"], replicas)
            kind = {"replicas": replicas, "shared": shared, "strangers": strangers, "prefix": prefix}
            table.append({**kind, **run, "needed": needed})
    return {"times": vars(times), "check": check, "table": table}


if __name__ == "__main__":
    main()
