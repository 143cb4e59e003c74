"""Several replicas on one machine, all real: Ray Serve, vLLM, PostgreSQL, Prometheus.

    python -m benchmarks.replicas --out replicas.json            1, 2 and 3 replicas, then what is done to 3

It starts PostgreSQL (tests/app/postgres.py), `candor deploy` with the demo's model and bundle, and Prometheus where
there is a `prometheus`; then, one after the other:

    service       answers a second of one replica with 1 to 16 clients, and what a prompt's token costs
    throughput    whole answers a second and per second of processor time, with 1, 2 and 3 replicas
    verdicts      the same prompts, one at a time, on each replica
    promotion     another bundle while answers are asked for
    quota         a key that may use few tokens a day, asked of all replicas
    feedback      on an answer that another replica gave
    kill          -9 of a replica's process, of its vLLM process and of a worker of the ingress, amid load

On a machine with two cores three replicas cannot answer three times as much: what is shown is what a second of
processor time yields, and what is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from candor.app.edge.keys import make_key
from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish
from demo.task import made

ROOT = Path(__file__).resolve().parents[1]
QUOTA = 2_000
AT_ONCE = 8
LOADED_S = 18.0


@dataclass
class Load:
    """What came of requests that are asked all the time. outcomes: by status, or error's name, and replica.

    answered: (seconds, replica, bundle) of each.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, str, str]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        waited = sorted(self.waited)
        return {
            "outcomes": dict(self.outcomes),
            "by_replica": dict(Counter(replica for _, replica, _ in self.answered)),
            "p50_s": waited[len(waited) // 2] if waited else None,
            "p95_s": waited[len(waited) * 95 // 100] if waited else None,
        }


class Fleet:
    """The deployment under test."""

    def __init__(self, url: str, key: str, prompts: Sequence[str]) -> None:
        self.url = url
        self.key = key
        self.prompts = prompts
        self.http = httpx.Client(base_url=url, headers=self.headers(key), timeout=120)

    @staticmethod
    def headers(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    def body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": "word-ordering", "messages": [{"role": "user", "content": prompt}], **more}

    def ask(self, prompt: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=self.body(prompt, **more))

    def replicas(self) -> set[str]:
        """Those that answer now, as the common page of metrics has them."""
        page = self.http.get("/metrics").text
        return {line.split('"')[1] for line in page.splitlines() if line.startswith("candor_store_behind{")}

    async def load(
        self, seconds: float, during: Any = None, *, stream: bool = False, at_once: int = AT_ONCE
    ) -> tuple[Load, Any]:
        """Asks `at_once` answers at a time. during: awaited meanwhile, with the load, and for four seconds more; its
        result comes back too."""
        found, end = Load(), time.monotonic() + seconds
        busy = during is not None
        result: Any = None

        async def one(number: int) -> None:
            at = number
            async with httpx.AsyncClient(
                base_url=self.url, headers=self.headers(self.key), timeout=120
            ) as client:
                while busy or time.monotonic() < end:
                    body = self.body(self.prompts[at % len(self.prompts)], stream=stream)
                    at += at_once
                    began = time.monotonic()
                    try:
                        response = await client.post("/v1/chat/completions", json=body)
                    except httpx.HTTPError as error:
                        found.outcomes[type(error).__name__] += 1
                        continue
                    whole = not stream or response.text.endswith("data: [DONE]\n\n")
                    found.outcomes[str(response.status_code) if whole else "cut"] += 1
                    if response.status_code == 200 and whole:
                        replica, bundle = (
                            response.headers.get(h, "") for h in ("x-sdm-replica", "x-sdm-bundle")
                        )
                        found.answered.append((time.monotonic(), replica, bundle))
                        found.waited.append(time.monotonic() - began)
                    else:
                        await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(one(number)) for number in range(at_once)]
        if during is not None:
            result = await during(found)
            busy, end = False, max(end, time.monotonic() + 4)
        await asyncio.gather(*tasks)
        return found, result


def cpu_s() -> dict[str, float]:
    """Seconds of processor time of this process's descendants, by what they are."""
    used: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line, times = " ".join(process.cmdline()), process.cpu_times()
            kinds = {"VLLM::": "vllm", "model-0": "replica", "ingress": "ingress", "postgres": "postgres"}
            kinds |= {"PrefixTree": "prefix_tree", "ProxyActor": "proxy", "prometheus": "prometheus"}
            kind = next((kind for word, kind in kinds.items() if word in line), "rest_of_ray")
            used[kind] += times.user + times.system
    return dict(used)


def of_replica(name: str) -> psutil.Process:
    """The process of a replica, by Serve's short name for it."""
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            title = " ".join(process.info["cmdline"] or ())
            if title.startswith(f"ray::ServeReplica:{name}"):
                return process
    raise LookupError(name)


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(holds: Any, within_s: float, what: str) -> float:
    """Returns after how many seconds it held. Raises TimeoutError."""
    began = time.monotonic()
    while True:
        with suppress(httpx.HTTPError):
            if holds():
                return time.monotonic() - began
        if time.monotonic() - began > within_s:
            raise TimeoutError(what)
        time.sleep(0.2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def prompts(count: int) -> list[str]:
    lines = made("test").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["messages"][-1]["content"] for line in lines]


def another_bundle(folder: Path) -> tuple[Path, Path]:
    """Two bundles that judge alike and differ in their digest."""
    old, new = folder / "old", folder / "new"
    shutil.copytree(ROOT / "demo/bundle", old)
    bundle = load_bundle(old)
    manifest = replace(bundle.manifest, created="2026-11-26T00:00:00+00:00")
    publish(
        new,
        manifest,
        bundle.estimator,
        bundle.exemplars,
        bundle.report,
        bundle.rule.rule if bundle.rule else None,
    )
    return old, new


def service(fleet: Fleet) -> dict[str, Any]:
    rates: dict[str, float] = {}
    for clients in (1, 2, 4, 8, 16):
        began = time.monotonic()
        load, _ = asyncio.run(fleet.load(6, at_once=clients))
        rates[str(clients)] = len(load.answered) / (time.monotonic() - began)
    usage = [fleet.ask(prompt).json()["usage"] for prompt in fleet.prompts[:40]]
    points = []
    for several in (1, 8):
        for number in range(5):
            text = " ".join(fleet.prompts[at] for at in range(20 + 8 * number, 20 + 8 * number + several))
            began = time.monotonic()
            response = fleet.ask(text, max_tokens=1)
            points.append((response.json()["usage"]["prompt_tokens"], time.monotonic() - began))
    slope, _ = statistics.linear_regression([n for n, _ in points], [s for _, s in points])
    return {
        "answers_per_s": rates,
        "answer_tokens": [one["completion_tokens"] for one in usage],
        "prompt_tokens": statistics.mean(one["prompt_tokens"] for one in usage),
        "prefill_s_per_token": slope,
        "prefill_points": points,
    }


def throughput(fleet: Fleet, seconds: float) -> dict[str, Any]:
    asyncio.run(fleet.load(4))  # warm
    before, began = cpu_s(), time.monotonic()
    load, _ = asyncio.run(fleet.load(seconds))
    took, after = time.monotonic() - began, cpu_s()
    used = {kind: seconds - before.get(kind, 0.0) for kind, seconds in after.items()}
    answers = len(load.answered)
    return {
        "answers_per_s": answers / took,
        "cpu_s_per_answer": sum(used.values()) / max(1, answers),
        "cores_used": sum(used.values()) / took,
        "cpu_s_per_answer_of": {kind: seconds / max(1, answers) for kind, seconds in used.items()},
        **load.figures(),
    }


def verdicts(fleet: Fleet, count: int, replicas: int) -> dict[str, Any]:
    """Asks each prompt, one at a time, until each replica has answered it."""
    by_prompt: dict[str, dict[str, tuple[str, str, float]]] = defaultdict(dict)
    for prompt in fleet.prompts[:count]:
        for _ in range(12 * replicas):
            response = fleet.ask(prompt, temperature=0)
            result = response.json()["reliability"]["results"][0]
            said = response.json()["choices"][0]["message"]["content"]
            replica = response.headers["x-sdm-replica"]
            by_prompt[prompt][replica] = (said, result["region"], result.get("probability") or 0.0)
            if len(by_prompt[prompt]) == replicas:
                break
    seen = [list(found.values()) for found in by_prompt.values() if len(found) > 1]
    gaps = [max(one[2] for one in some) - min(one[2] for one in some) for some in seen]
    return {
        "prompts": len(by_prompt),
        "on_several": len(seen),
        "on_all": sum(len(some) == replicas for some in seen),
        "same_answer": sum(len({one[0] for one in some}) == 1 for some in seen),
        "same_region": sum(len({one[1] for one in some}) == 1 for some in seen),
        "largest_gap_of_probability": max(gaps, default=None),
    }


def promotion(fleet: Fleet, new: str) -> dict[str, Any]:
    async def promote(_: Load) -> dict[str, Any]:
        await asyncio.sleep(5)
        async with httpx.AsyncClient(
            base_url=fleet.url, headers=fleet.headers(fleet.key), timeout=120
        ) as client:
            began = time.monotonic()
            response = await client.post("/bundles/promote", json={"bundle": new})
            return {
                "status": response.status_code,
                "took_s": time.monotonic() - began,
                "at": time.monotonic(),
            }

    load, done = asyncio.run(fleet.load(LOADED_S, promote))
    bundles = Counter(bundle for _, _, bundle in load.answered)
    last_old = max((at for at, _, bundle in load.answered if bundle != new_digest(load)), default=0.0)
    first_new = min((at for at, _, bundle in load.answered if bundle == new_digest(load)), default=0.0)
    by = {replica: bundle for _, replica, bundle in sorted(load.answered)}
    return {
        **{name: value for name, value in done.items() if name != "at"},
        "bundles": dict(bundles),
        "at_the_end": by,
        "old_answers_end_after_first_new_s": last_old - first_new,
        **load.figures(),
    }


def new_digest(load: Load) -> str:
    return load.answered[-1][2]


def quota(fleet: Fleet, key: str) -> dict[str, Any]:
    """Asks with a key of few tokens a day until it is refused on every replica."""
    outcomes: Counter[str] = Counter()
    used, refused_by, answered_by = 0, set(), set()
    with httpx.Client(base_url=fleet.url, headers=fleet.headers(key), timeout=120) as client:
        for number in range(120):
            response = client.post("/v1/chat/completions", json=fleet.body(fleet.prompts[number]))
            outcomes[str(response.status_code)] += 1
            replica = response.headers.get("x-sdm-replica", "")
            if response.status_code == 200:
                used += response.json()["usage"]["prompt_tokens"]
                answered_by.add(replica)
            else:
                refused_by.add(replica)
            if outcomes["429"] >= 12:
                break
    return {
        "tokens_per_day": QUOTA,
        "outcomes": dict(outcomes),
        "prompt_tokens_answered": used,
        "answered_by": len(answered_by),
        "refused_by": len(refused_by),
    }


def feedback(fleet: Fleet) -> dict[str, Any]:
    """Gives feedback until one is taken by another replica than answered."""
    response = fleet.ask(fleet.prompts[0])
    answered, id = response.headers["x-sdm-replica"], response.json()["id"]
    time.sleep(0.5)
    for _ in range(40):
        given = fleet.http.post("/v1/reliability/feedback", json={"id": id, "correct": True})
        shown = fleet.http.get(f"/v1/reliability/answers/{id}")
        others = {one.headers["x-sdm-replica"] for one in (given, shown)} - {answered}
        if given.headers["x-sdm-replica"] != answered and shown.headers["x-sdm-replica"] != answered:
            return {"feedback": given.status_code, "shown": shown.status_code, "by_others": len(others)}
    return {"feedback": None, "shown": None, "by_others": 0}


def kill(fleet: Fleet, which: str, replicas: int, *, stream: bool) -> dict[str, Any]:
    async def strike(load: Load) -> dict[str, Any]:
        await asyncio.sleep(4)
        if which == "ingress":
            victim = of_replica("candor:ingress")
        else:
            victim = of_replica("candor:model-0")
            if which == "vllm":
                victim = next(
                    one for one in victim.children(recursive=True) if "Engine" in " ".join(one.cmdline())
                )
        children = victim.children(recursive=True)
        at = time.monotonic()
        victim.kill()
        known = {replica for _, replica, _ in load.answered}
        await asyncio.sleep(0)
        return {"at": at, "children": [one.pid for one in children], "known": known}

    load, struck = asyncio.run(fleet.load(LOADED_S, strike, stream=stream))
    back = (
        until(lambda: len(fleet.replicas()) >= replicas, 180, "a new replica") if which != "ingress" else None
    )
    after = [at for at, _, _ in load.answered if at > struck["at"]]
    gaps = [b - a for a, b in zip([struck["at"], *after], after, strict=False)]
    return {
        "which": which,
        "stream": stream,
        "first_answer_after_s": after[0] - struck["at"] if after else None,
        "longest_gap_s": max(gaps, default=None),
        "replicas_again_after_s": None if back is None else LOADED_S - 4 + back,
        "orphans": [pid for pid in struck["children"] if psutil.pid_exists(pid)],
        **load.figures(),
    }


def killed(fleet: Fleet, which: str, replicas: int, *, stream: bool, log: Path) -> dict[str, Any]:
    def asked_again() -> int:
        return log.read_text(errors="replace").count("asked again (")

    before = asked_again()
    struck = kill(fleet, which, replicas, stream=stream)
    return {**struck, "asked_again": asked_again() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "var/models/smollm2-135m-word-ordering")
    parser.add_argument("--out", type=Path, default=Path("replicas.json"))
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["service", "throughput", "verdicts", "promotion", "quota", "feedback", "kill"],
    )
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--routing", default="prefix")
    given = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "throughput": {}}
    folder = Path(tempfile.mkdtemp(prefix="candor-replicas-"))
    log = folder / "log"
    made_postgres = runpy.run_path(str(ROOT / "tests/app/postgres.py"))
    try:
        with made_postgres["running"]() as postgres:
            measure(given, found, folder, log, postgres.database())
    finally:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
        shutil.copy(log, given.out.with_suffix(".log"))
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))


def measure(given: argparse.Namespace, found: dict[str, Any], folder: Path, log: Path, store: str) -> None:
    old, _ = another_bundle(folder)
    (key, line), (few, few_line) = (
        make_key("all", ["answer", "feedback", "review", "operate"]),
        make_key("few", ["answer"]),
    )
    (folder / "keys").write_text(line.line() + few_line.line().replace("\n", f" tokens-per-day={QUOTA}\n"))
    port = free_port()
    settings = {
        "CANDOR_MODEL": given.model,
        "CANDOR_BUNDLE": old,
        "CANDOR_PORT": port,
        "CANDOR_KEYS": folder / "keys",
        "CANDOR_STORE": store,
        "CANDOR_STORE_SPOOL": folder / "spool",
        "CANDOR_AUDIT_SHARE": 0.2,
        "CANDOR_EAGER": "true",
        "CANDOR_MAX_MODEL_LEN": 1024,
        "CANDOR_KV_CACHE_BYTES": 1 << 28,
    }
    (folder / "settings.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    fleet = Fleet(f"http://127.0.0.1:{port}", key, prompts(200))

    def deploy(replicas: int, *more: str) -> list[str]:
        words = [
            "deploy",
            folder / "settings.env",
            "--replicas",
            replicas,
            "--cpus",
            0.5,
            "--routing",
            given.routing,
        ]
        words += more
        return [sys.executable, "-c", "from candor.app.cli import main; main()", *map(str, words)]

    began = time.monotonic()
    with started(deploy(given.replicas[0]), log, OMP_NUM_THREADS="1", RAY_ADDRESS="", RAY_DEDUP_LOGS="0"):
        until(lambda: fleet.http.get("/readyz").status_code == 200, 240, "the first replica")
        until(lambda: len(fleet.replicas()) >= given.replicas[0], 240, "the others")
        found["start_s"] = time.monotonic() - began
        with prometheus(folder, port, key) as scraped:
            if "service" in given.parts:
                asyncio.run(fleet.load(4))  # warm
                found["service"] = service(fleet)
                given.out.write_text(json.dumps(found, indent=2) + "\n")
                given.out.with_suffix(".txt").write_text(fleet.http.get("/metrics").text)
            for replicas in given.replicas:
                if replicas != given.replicas[0]:
                    began = time.monotonic()
                    subprocess.run(deploy(replicas, "--address", "auto"), cwd=ROOT, check=True, timeout=300)
                    until(lambda n=replicas: len(fleet.replicas()) >= n, 240, "replicas")
                    found.setdefault("grown_in_s", {})[str(replicas)] = time.monotonic() - began
                if "throughput" in given.parts:
                    found["throughput"][str(replicas)] = throughput(fleet, given.seconds)
                    given.out.write_text(json.dumps(found, indent=2) + "\n")
            found["prometheus"] = scraped()
        last = given.replicas[-1]
        work: dict[str, Any] = {
            "verdicts": lambda: verdicts(fleet, 8, last),
            "promotion": lambda: promotion(fleet, "new"),
            "quota": lambda: quota(fleet, few),
            "feedback": lambda: feedback(fleet),
        }
        for which, stream in (("replica", False), ("ingress", False), ("replica", True), ("vllm", False)):
            work[f"kill {which}{' amid streams' if stream else ''}"] = partial(
                killed, fleet, which, last, stream=stream, log=log
            )
        for name, do in work.items():
            if name.split()[0] in given.parts:
                try:
                    found[name] = do()
                except Exception as error:  # the other parts are worth having
                    found[name] = repr(error)
                given.out.write_text(json.dumps(found, indent=2) + "\n")


@contextmanager
def prometheus(folder: Path, port: int, key: str) -> Iterator[Any]:
    """Scrapes the common page; gives a function that says what Prometheus knows."""
    program, own = shutil.which("prometheus"), free_port()
    if program is None:
        yield lambda: None
        return
    config = {
        "global": {"scrape_interval": "2s"},
        "scrape_configs": [
            {
                "job_name": "candor",
                "authorization": {"credentials": key},
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with started([*command, f"--web.listen-address=127.0.0.1:{own}"], folder / "prometheus.log"):

        def query(words: str) -> Any:
            response = httpx.get(f"http://127.0.0.1:{own}/api/v1/query", params={"query": words})
            return [(one["metric"], one["value"][1]) for one in response.json()["data"]["result"]]

        def scraped() -> dict[str, Any]:
            time.sleep(3)
            by = query("sum by (replica) (sdm_answers_total)") or query(
                'count by (replica) ({__name__=~"sdm_.*"})'
            )
            return {
                "up": query("up"),
                "series": query('count({job="candor"})'),
                "series_by_replica": query('count by (replica) ({job="candor"})'),
                "verdicts_by_replica": by,
                "scrape_s": query("scrape_duration_seconds"),
            }

        yield scraped


if __name__ == "__main__":
    main()
