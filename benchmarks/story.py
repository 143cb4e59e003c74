"""A certificate's life, on real things: PostgreSQL, Prometheus, vLLM and a browser; and the figures of each step.

    python -m benchmarks.story

The demo's server gets prompts like the calibration's, and draws answers for audits. Then a gateway in front of it
begins to write some prompts in small letters. The model copies them, which is wrong, though such prompts look known:
the base rate falls. Prompts show the drift, labels raise the alarm, and the server withholds. Audits are labelled on
the review page with the keyboard, as the task's verifier says. They make the next bundle, which shadows, is promoted,
rolled back and promoted again under load.

Needed: `postgres` and `initdb`, `prometheus`, `chromium`, and playwright (extra dev).
"""

from __future__ import annotations

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
from sqlalchemy import select

from benchmarks.servers import Serving, free_port, running, serving
from candor.app.store.database import Database
from candor.app.store.tables import verdicts
from candor.calibration.verifiers import load_verifier
from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish
from demo import task

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "var/models/smollm2-135m-word-ordering"
ALPHA = 0.9
CLAIMED = "0.95"
CANDOR = [sys.executable, "-c", "from candor.app.cli import main; main()"]
CLIENTS = 16

_SHOWN = (
    "() => ['#conversation .text', '#text', '#about'].map((one) => document.querySelector(one)?.textContent)"
)
_ANOTHER = """(about) => !document.querySelector('#empty').hidden
    || document.querySelector('#about').textContent !== about"""

Prompt = dict[str, Any]
"""A record of the task: `messages` and `reference`."""


@dataclass(frozen=True)
class Answer:
    """status: of the response, or what broke. bundle: the digest that the response names. right: as the verifier has
    it; None for a text that was not given. score_min: the bundle's threshold, as the verdict has it."""

    id: str
    status: str
    bundle: str = ""
    abstained: bool = False
    reason: str | None = None
    right: bool | None = None
    score_min: float | None = None


@dataclass
class Story:
    """What the steps share. lines: of the table that is written at the end."""

    folder: Path
    store: str
    prometheus: httpx.Client
    page: Any
    client: httpx.Client
    references: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    labels: int = 0
    lines: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def tell(self, step: str, said: str) -> None:
        seconds = time.monotonic() - self.began
        self.lines.append(f"| {step} | {said} | {seconds:,.0f} |")
        typer.echo(f"{seconds:5.0f} s  {step}: {said}", err=True)


def prompts(fall: float) -> Iterator[Prompt]:
    """Yields prompts of the task that neither model nor bundle has seen, at random. fall: share in small letters."""
    lines = (ROOT / "demo/sentences.txt").read_text(encoding="utf-8").splitlines()[2050:]
    random.Random(task.SEED).shuffle(lines)
    unseen = [line for line in lines if len(line.split()) <= task.LONGEST][:950]  # of its test and ood
    lots, seen = random.Random(fall), set()
    while True:
        for one in task.questions("story", lots.sample(unseen, len(unseen)), lots):
            content = one["messages"][0]["content"]
            if content not in seen:
                seen.add(content)
                yield lowered(one) if lots.random() < fall else one


def lowered(one: Prompt) -> Prompt:
    """The prompt as the gateway writes it; what is right stays."""
    instruction, rest = one["messages"][0]["content"].split("\n", 1)
    rest = re.sub(r"(?<=: ).*", lambda found: found[0].lower(), rest)
    return one | {"messages": [{"role": "user", "content": f"{instruction}\n{rest}"}]}


def ask(story: Story, url: str, prompt: Prompt, mode: Literal["annotate", "abstain"] = "annotate") -> Answer:
    body = {"model": "word-ordering", "messages": prompt["messages"], "reliability": {"mode": mode}}
    story.references[prompt["messages"][0]["content"]] = prompt["reference"]
    try:
        response = story.client.post(f"{url}/v1/chat/completions", json=body)
        if response.status_code != 200:
            return Answer("", f"{response.status_code} {response.text[:200]}")
        said = response.json()
        [result] = said["reliability"]["results"]
        text = said["choices"][0]["message"]["content"]
        return Answer(
            said["id"],
            "200",
            response.headers["x-sdm-bundle"],
            result["abstained"],
            result["reason"],
            None if text is None else bool(load_verifier("exact")(text, prompt["reference"])),
            result["rule"]["score_min"],
        )
    except httpx.HTTPError as error:
        return Answer("", repr(error))


def ask_all(story: Story, url: str, asked: Sequence[Prompt], **how: Any) -> list[Answer]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda one: ask(story, url, one, **how), asked))
    story.answers += found
    return found


def take(some: Iterator[Prompt], count: int) -> list[Prompt]:
    return [next(some) for _ in range(count)]


def share(found: Sequence[Answer]) -> str:
    """How many were let through, how many of these are right, and how many of all."""
    through = [one for one in found if not one.abstained]
    right = sum(bool(one.right) for one in through)
    percent = f"{right / len(through):.0%}" if through else "none"
    return (
        f"{len(found)} requests, {sum(bool(one.right) for one in found)} answers right; {len(through)} let through, "
        f"{right} of them right ({percent})"
    )


def label(story: Story, url: str, kind: Literal["sampled", "withheld"]) -> int:
    """Labels a whole queue on the review page in the browser, with the keyboard. Returns how many."""
    verify, count = load_verifier("exact"), 0
    story.page.goto(f"{url}/console/review.html")
    story.page.locator(f"input[value={kind}]").check()
    story.page.wait_for_load_state("networkidle")
    while not story.page.locator("#empty").is_visible():
        prompt, answer, about = story.page.evaluate(_SHOWN)
        if prompt is None:  # the drawn ones, whose texts are kept, come first
            break
        story.page.keyboard.press("r" if verify(answer, story.references[prompt]) else "w")
        story.page.wait_for_function(_ANOTHER, arg=about)
        count += 1
    story.labels += count
    time.sleep(1)  # a label wakes those who watch the certificates
    return count


def standing(url: str) -> dict[str, Any]:
    """Of the certificate at ALPHA."""
    shown = httpx.get(f"{url}/v1/reliability", timeout=30).json()["standings"]
    found: dict[str, Any] = next(one for one in shown if one["alpha"] == ALPHA)
    return found


def firing(story: Story, name: str) -> bool:
    alerts = story.prometheus.get("/api/v1/alerts").json()["data"]["alerts"]
    return any(one["labels"]["alertname"] == name and one["state"] == "firing" for one in alerts)


def until(holds: Callable[[], bool], within_s: float = 60) -> float:
    """Seconds until it holds. Raises RuntimeError if it does not."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise RuntimeError("what was waited for did not come")
        time.sleep(0.2)
    return time.monotonic() - began


# The steps


def calm(story: Story, url: str, count: int) -> None:
    found = ask_all(story, url, take(prompts(0.0), count))
    labelled = label(story, url, "sampled")
    stands = standing(url)
    story.tell("traffic like the calibration's", share(found))
    story.tell(
        "its audits",
        f"{labelled} labels; the certificate of {CLAIMED} is {stands['standing']}, evidence against it "
        f"{stands['alarm']:.2f} of {stands['threshold']:.2f} needed (log10)",
    )


def falls(story: Story, url: str, traffic: Iterator[Prompt], chunk: int = 24) -> None:
    found: list[Answer] = []
    labelled, drift, began = 0, 0, time.monotonic()
    while standing(url)["standing"] != "suspended":
        found += ask_all(story, url, take(traffic, chunk))
        drift = drift or (len(found) if firing(story, "CandorPromptDrift") else 0)
        labelled += label(story, url, "sampled")
    stands, seconds = standing(url), time.monotonic() - began
    waited = until(lambda: firing(story, "CandorCertificateSuspended"))
    until(lambda: firing(story, "CandorPromptDrift"))
    story.tell("the base rate falls", share(found))
    story.tell(
        "drift, without labels", f"`CandorPromptDrift` fires after at most {drift or len(found)} requests"
    )
    story.tell(
        "the alarm",
        f"`suspended` after {labelled} labels, {len(found)} requests and {seconds:.0f} s (evidence "
        f"{stands['alarm']:.2f} of {stands['threshold']:.2f}); `CandorCertificateSuspended` fires {waited:.1f} s "
        "later",
    )
    refused = ask_all(story, url, take(traffic, 40), mode="abstain")
    reasons = Counter(one.reason for one in refused if one.abstained)
    story.tell(
        "the server withholds",
        f"of {len(refused)} requests {sum(one.right is not None for one in refused)} get an answer; "
        + ", ".join(f"{count} `{reason}`" for reason, count in reasons.most_common()),
    )


def audits(story: Story, url: str, traffic: Iterator[Prompt], count: int) -> None:
    found = ask_all(story, url, take(traffic, count))
    began, labelled = time.monotonic(), 0
    for kind in ("sampled", "withheld"):
        labelled += label(story, url, kind)
    seconds = time.monotonic() - began
    story.tell("more traffic, all of it marked as not reliable", share(found))
    story.tell("audits on the review page", f"{labelled} labels with the keyboard in {seconds:.0f} s")


def recalibrates(story: Story, old: Path, new: Path, since: float) -> None:
    began = time.monotonic()
    after = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since))
    command = [*CANDOR, "recalibrate", "--from", story.store, "--bundle", str(old), "--out", str(new)]
    done = subprocess.run([*command, "--since", after], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    typer.echo(done.stdout, err=True)
    made = load_bundle(new)
    lineage = made.manifest.provenance["lineage"]
    certificate = made.manifest.rule.at(ALPHA) if made.manifest.rule else None
    assert certificate is not None
    story.tell(
        "`candor recalibrate`",
        f"{lineage['audits']} audits since the fall, of which {lineage['certifying']} certify and nothing else: "
        f"{certificate.right} right of {certificate.answered} answered, at least {certificate.accuracy:g} "
        f"(bound {certificate.lower_bound:.4f}); {time.monotonic() - began:.0f} s",
    )


def shadows(story: Story, url: str, traffic: Iterator[Prompt], count: int) -> None:
    found = ask_all(story, url, take(traffic, count))

    def shadow() -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{url}/bundles", timeout=30).json()["data"][0]["shadow"]
        return told

    until(lambda: sum(sum(row.values()) for row in shadow()["decisions"].values()) == len(found))
    cells = [
        f"{count} {old}, then {new}"
        for old, row in shadow()["decisions"].items()
        for new, count in row.items()
        if count
    ]
    story.tell("it shadows", f"{len(found)} requests: {', '.join(cells)}")


def changes(story: Story, url: str, traffic: Iterator[Prompt], pause_s: float) -> None:
    """Promotes, rolls back and promotes while CLIENTS ask without a pause."""
    done, asked = threading.Event(), threading.Lock()
    found: list[Answer] = []

    def client() -> None:
        while not done.is_set():
            with asked:
                prompt = next(traffic)
            found.append(ask(story, url, prompt))

    took = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            for change in ("promote", "rollback", "promote"):
                time.sleep(pause_s)
                began = time.monotonic()
                subprocess.run([*CANDOR, change, "--url", url], check=True, capture_output=True, cwd=ROOT)
                took.append(time.monotonic() - began)
            time.sleep(pause_s)
        finally:
            done.set()
        for one in clients:
            one.result(120)
    story.answers += found
    by_bundle = Counter(one.bundle[:12] for one in found)
    story.tell(
        "promoted, rolled back and promoted under load",
        f"{len(found)} requests by {CLIENTS} clients, {sum(one.status != '200' for one in found)} failed; "
        + ", ".join(f"{count} by `{digest}`" for digest, count in by_bundle.items())
        + f"; the commands took {', '.join(f'{one:.1f}' for one in took)} s",
    )


def renewed(story: Story, url: str, traffic: Iterator[Prompt], count: int) -> None:
    cleared = until(lambda: not firing(story, "CandorCertificateSuspended"))
    found = ask_all(story, url, take(traffic, count))
    labelled = label(story, url, "sampled")
    stands = standing(url)
    story.tell("the same traffic, by the new bundle", share(found))
    story.tell(
        "its certificate",
        f"{stands['standing']}: of {stands['right'] + stands['wrong']} audits {stands['right']} are right "
        f"({labelled} labels more); the alert ended within {cleared:.0f} s",
    )


def checks(story: Story, thresholds: dict[str, float]) -> None:
    """Raises RuntimeError unless every verdict names the bundle that gave it, in the response and in the store."""
    failed = [one.status for one in story.answers if one.status != "200"]
    database = Database.open(story.store)
    try:
        asked = select(verdicts.c.id, verdicts.c.bundle)
        kept = dict(database.read(lambda connection: connection.execute(asked).tuples().all()))
    finally:
        database.close()
    given = [one for one in story.answers if one.status == "200"]
    wrong = [
        one for one in given if kept.get(one.id) != one.bundle or thresholds[one.bundle] != one.score_min
    ]
    if failed or wrong:
        raise RuntimeError(f"failed: {failed[:5]}; verdicts of another bundle than they name: {wrong[:5]}")
    story.tell(
        "in all",
        f"{len(given)} requests, {len(failed)} failed; {story.labels} labels; every verdict in the store bears the "
        "bundle that its response named, and was made with that bundle's threshold",
    )


# What they run on


def first_bundle(path: Path) -> str:
    """Writes the demo's bundle without its certificate of 0.98: a new one would need some 1,500 labels for that."""
    demo = load_bundle(ROOT / "demo/bundle")
    assert demo.manifest.rule is not None
    assert demo.rule is not None
    rule = replace(
        demo.manifest.rule,
        certificates=tuple(one for one in demo.manifest.rule.certificates if one.alpha < 0.98),
    )
    alphas = tuple(one for one in demo.manifest.alphas if one < 0.98)
    estimator = replace(demo.estimator, regions={alpha: demo.estimator.regions[alpha] for alpha in alphas})
    manifest = replace(demo.manifest, rule=rule, alphas=alphas, files={})
    return publish(path, manifest, estimator, demo.exemplars, demo.report, demo.rule.rule)


@contextmanager
def prometheus(folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with our rules and alerts, which looks every second at what `targets.json` in its folder names."""
    rules = ("rules.yml", "alerts.yml")
    for name in rules:
        shutil.copy(ROOT / "docker/prometheus" / name, folder / name)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": rules,
        "scrape_configs": [{"job_name": "candor", "file_sd_configs": [{"files": ["targets.json"]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    port = free_port()
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    with (
        running(command, f"{url}/-/ready", 60, folder=folder),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


@contextmanager
def browser_page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


@contextmanager
def candor(story: Story, bundle: Path, **more: str) -> Iterator[Serving]:
    settings = {
        "CANDOR_STORE": story.store,
        "CANDOR_STORE_SPOOL": str(story.folder / "spool"),
        "CANDOR_AUDIT_SHARE": "0.75",
        "CANDOR_KEEP_TEXTS": "drawn",
        "CANDOR_KEEP_STATES": "drawn",
        "CANDOR_ON_SUSPENDED": "abstain",
        "CANDOR_EAGER": "true",
        "CANDOR_MAX_MODEL_LEN": "1024",
        "CANDOR_KV_CACHE_BYTES": str(1 << 28),
        "CANDOR_SHUTDOWN_DELAY_S": "0",
    }
    with serving(MODEL, bundle, settings | more) as server:
        target = [{"targets": [server.url.removeprefix("http://")]}]
        (story.folder / "targets.json").write_text(json.dumps(target), encoding="utf-8")
        yield server


def main(
    first: Annotated[int, typer.Option(help="Requests before the fall.")] = 160,
    fall: Annotated[float, typer.Option(help="Share of prompts in small letters after it.")] = 0.25,
    audited: Annotated[int, typer.Option(help="Requests between alarm and the next bundle.")] = 1100,
    later: Annotated[int, typer.Option(help="Requests while it shadows, and after it was promoted.")] = 150,
    pause_s: Annotated[float, typer.Option(help="Seconds between changes of the bundle, under load.")] = 4.0,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="candor-story-"))
    old, new, traffic = folder / "old", folder / "new", prompts(fall)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        database = stack.enter_context(runpy.run_path(str(ROOT / "tests/app/postgres.py"))["running"]())
        watching = stack.enter_context(prometheus(folder))
        client = stack.enter_context(httpx.Client(timeout=120))
        page = stack.enter_context(browser_page())
        story = Story(folder, database.database(), watching, page, client)
        first_bundle(old)
        with candor(story, old) as server:
            story.tell(
                "started", f"PostgreSQL, Prometheus, a browser and the server ({server.start_s:.0f} s)"
            )
            calm(story, server.url, first)
            fell = time.time()
            falls(story, server.url, traffic)
            audits(story, server.url, traffic, audited)
        recalibrates(story, old, new, fell)
        with candor(story, old, CANDOR_SHADOW=str(new)) as server:
            stands = standing(server.url)["standing"]
            story.tell(
                "started again with `--shadow`", f"{server.start_s:.0f} s; the certificate is still {stands}"
            )
            shadows(story, server.url, traffic, later)
            changes(story, server.url, traffic, pause_s)
            renewed(story, server.url, traffic, later)
        bundles = {one.digest: one.manifest.rule for one in map(load_bundle, (old, new))}
        checks(story, {digest: rule.at(ALPHA).score_min for digest, rule in bundles.items()})  # type: ignore[union-attr]
    typer.echo("| step | what came of it | s |\n|---|---|---|\n" + "\n".join(story.lines))


if __name__ == "__main__":
    typer.run(main)
