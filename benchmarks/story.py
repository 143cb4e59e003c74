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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from sqlalchemy import select

from benchmarks.servers import Serving, free_port, running, serving
from candor.app.store.database import Database
from candor.app.store.tables import verdicts
from candor.calibration.verifiers import load_verifier
from candor.model_store.bundle import load_bundle
from candor.model_store.store import publish
from candor.policy.certificate import RuleCertificate
from demo import task

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "var/models/smollm2-135m-word-ordering"
CANDOR = [sys.executable, "-c", "from candor.app.cli import main; main()"]
ALPHA = 0.9
"""What requests ask for. The demo's rule is certified at 0.95 there."""
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

    status: str
    id: str = ""
    bundle: str = ""
    abstained: bool = False
    reason: str | None = None
    right: bool | None = None
    score_min: float | None = None


class Story:
    """Asks, labels and looks, and writes down what came of each step. url: of the server that answers now."""

    def __init__(self, store: str, prometheus: httpx.Client, page: Any, screenshots: Path | None) -> None:
        self.store = store
        self.url = ""
        self.answers: list[Answer] = []
        self.labels = 0
        self.lines = ["| step | what came of it | s |", "|---|---|---|"]
        self._began = time.monotonic()
        self._prometheus, self._page, self._screenshots = prometheus, page, screenshots
        self._client = httpx.Client(timeout=120)
        self._verify = load_verifier("exact")
        self._references: dict[str, str] = {}

    def tell(self, step: str, said: str) -> None:
        seconds = time.monotonic() - self._began
        self.lines.append(f"| {step} | {said} | {seconds:,.0f} |")
        typer.echo(f"{seconds:5.0f} s  {step}: {said}", err=True)

    def picture(self, name: str, path: str | None = None) -> None:
        """Takes a picture of the page, or of the one at that path, where pictures are wanted."""
        if self._screenshots is not None:
            if path is not None:
                self._page.goto(self.url + path)
                self._page.wait_for_load_state("networkidle")
            self._page.screenshot(path=self._screenshots / f"{name}.png", full_page=True)

    def get(self, path: str) -> Any:
        return self._client.get(self.url + path).json()

    def ask(self, prompt: Prompt, mode: str = "annotate") -> Answer:
        body = {"model": "word-ordering", "messages": prompt["messages"], "reliability": {"mode": mode}}
        self._references[prompt["messages"][0]["content"]] = prompt["reference"]
        try:
            response = self._client.post(f"{self.url}/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            return Answer(repr(error))
        if response.status_code != 200:
            return Answer(f"{response.status_code} {response.text[:200]}")
        said, bundle = response.json(), response.headers["x-sdm-bundle"]
        [result] = said["reliability"]["results"]
        text = said["choices"][0]["message"]["content"]
        right = None if text is None else bool(self._verify(text, prompt["reference"]))
        rule = result["rule"]
        return Answer(
            "200", said["id"], bundle, result["abstained"], result["reason"], right, rule["score_min"]
        )

    def ask_all(self, traffic: Iterator[Prompt], count: int, mode: str = "annotate") -> list[Answer]:
        prompts = [next(traffic) for _ in range(count)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(lambda one: self.ask(one, mode), prompts))
        self.answers += found
        return found

    def label(self, kind: str) -> int:
        """Labels a whole queue on the review page in the browser, with the keyboard. Returns how many."""
        page, count = self._page, 0
        page.goto(f"{self.url}/console/review.html")
        page.locator(f"input[value={kind}]").check()
        page.wait_for_load_state("networkidle")
        self.picture(kind)
        while not page.locator("#empty").is_visible():
            prompt, answer, about = page.evaluate(_SHOWN)
            if prompt is None:  # the drawn ones, whose texts are kept, come first
                break
            page.keyboard.press("r" if self._verify(answer, self._references[prompt]) else "w")
            page.wait_for_function(_ANOTHER, arg=about)
            count += 1
        self.labels += count
        time.sleep(1)  # a label wakes those who watch the certificates
        return count

    def standing(self) -> dict[str, Any]:
        shown = self.get("/v1/reliability")["standings"]
        return next(one for one in shown if one["alpha"] == ALPHA)

    def fires(self, name: str) -> bool:
        alerts = self._prometheus.get("/api/v1/alerts").json()["data"]["alerts"]
        return any(one["labels"]["alertname"] == name and one["state"] == "firing" for one in alerts)


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


def until(holds: Callable[[], bool], within_s: float = 60) -> float:
    """Seconds until it holds. Raises RuntimeError if it does not."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise RuntimeError("what was waited for did not come")
        time.sleep(0.2)
    return time.monotonic() - began


def share(found: Sequence[Answer]) -> str:
    """How many of the answers the rule covers, also where its certificate is suspended, and how right they are."""
    covered = [one for one in found if one.reason in (None, "certificate_suspended")]
    right = sum(bool(one.right) for one in covered)
    through = sum(not one.abstained for one in found)
    return (
        f"{len(found)} requests, {sum(bool(one.right) for one in found)} answers right; {through} let through; "
        f"{len(covered)} reach the threshold, {right} of them right ({right / len(covered):.0%})"
    )


# The steps


def calm(story: Story, count: int) -> None:
    found = story.ask_all(prompts(0.0), count)
    labelled, stands = story.label("sampled"), story.standing()
    if story.fires("CandorPromptDrift") or story.fires("CandorCertificateSuspended"):
        raise RuntimeError("an alert fires before anything has changed")
    story.tell("traffic like the calibration's", share(found))
    evidence = f"evidence against it {stands['alarm']:.2f} of {stands['threshold']:.2f} (log10)"
    story.tell(
        "its audits", f"{labelled} labels; the certificate is {stands['standing']}, {evidence}; no alert"
    )


def falls(story: Story, traffic: Iterator[Prompt], chunk: int = 24) -> None:
    found: list[Answer] = []
    labelled, drifted, began = 0, 0, time.monotonic()
    while story.standing()["standing"] != "suspended":
        found += story.ask_all(traffic, chunk)
        labelled += story.label("sampled")
        drifted = drifted or (len(found) if story.fires("CandorPromptDrift") else 0)
    stands, seconds = story.standing(), time.monotonic() - began
    waited = until(lambda: story.fires("CandorCertificateSuspended"))
    story.tell("the base rate falls", share(found))
    drift = f"after at most {drifted} requests" if drifted else "not yet"
    story.tell("drift, without labels", f"`CandorPromptDrift` fires: {drift}")
    evidence = f"evidence {stands['alarm']:.2f} of {stands['threshold']:.2f}"
    alarm = f"`suspended` after {labelled} labels, {len(found)} requests and {seconds:.0f} s ({evidence})"
    story.tell("the alarm", f"{alarm}; `CandorCertificateSuspended` fires {waited:.1f} s later")
    refused = story.ask_all(traffic, 40, mode="abstain")
    given = sum(one.right is not None for one in refused)
    reasons = Counter(one.reason for one in refused).most_common()
    why = ", ".join(f"{count} `{reason}`" for reason, count in reasons)
    story.tell("the server withholds", f"of {len(refused)} requests {given} get an answer: {why}")


def audits(story: Story, traffic: Iterator[Prompt], count: int) -> None:
    found = story.ask_all(traffic, count)
    story.tell("more of it, asked for with verdicts beside the answers", share(found))
    began = time.monotonic()
    labelled = [story.label(kind) for kind in ("sampled", "withheld")]
    seconds = time.monotonic() - began
    story.tell("audits on the review page", f"{sum(labelled)} labels with the keyboard in {seconds:.0f} s")


def recalibrates(story: Story, old: Path, new: Path, since: float) -> bool:
    """Returns whether there is a new bundle; one in some six of such samples certifies nothing.

    since: only answers given from then on count, as an operator would say who knows when the traffic changed.
    """
    began, after = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since))
    command = [*CANDOR, "recalibrate", "--from", story.store, "--bundle", str(old), "--out", str(new)]
    done = subprocess.run([*command, "--since", after], capture_output=True, text=True, check=False, cwd=ROOT)
    typer.echo(done.stdout + done.stderr, err=True)
    if done.returncode:
        story.tell("`candor recalibrate`", done.stderr.partition("; nothing")[0].splitlines()[-1])
        return False
    manifest = load_bundle(new).manifest
    lineage, made = manifest.provenance["lineage"], certified(new)[1]
    used = f"{lineage['audits']} audits since the fall, {lineage['certifying']} of which only certify"
    proven = f"{made.right} right of {made.answered} answered: at least {made.accuracy:g}"
    bound = f"(bound {made.lower_bound:.4f})"
    story.tell("`candor recalibrate`", f"{used}: {proven} {bound}; {time.monotonic() - began:.0f} s")
    return True


def shadows(story: Story, traffic: Iterator[Prompt], count: int) -> None:
    found = story.ask_all(traffic, count)

    def cells() -> dict[str, int]:
        rows = story.get("/bundles")["data"][0]["shadow"]["decisions"]
        return {f"{old}, by it {new}": n for old, row in rows.items() for new, n in row.items() if n}

    until(lambda: sum(cells().values()) >= len(found))
    told = "; ".join(f"{n} {name}" for name, n in cells().items())
    story.tell("it shadows", f"{len(found)} requests: {told}")


def changes(story: Story, traffic: Iterator[Prompt], pause_s: float) -> None:
    """Promotes, rolls back and promotes while CLIENTS ask without a pause."""
    done, turn = threading.Event(), threading.Lock()
    found: list[Answer] = []
    took: list[float] = []

    def client() -> None:
        while not done.is_set():
            with turn:
                prompt = next(traffic)
            found.append(story.ask(prompt))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            for change in ("promote", "rollback", "promote"):
                time.sleep(pause_s)
                began = time.monotonic()
                subprocess.run(
                    [*CANDOR, change, "--url", story.url], check=True, capture_output=True, cwd=ROOT
                )
                took.append(time.monotonic() - began)
            time.sleep(pause_s)
        finally:
            done.set()
        for one in clients:
            one.result()
    story.answers += found
    failed = sum(one.status != "200" for one in found)
    by = ", ".join(f"{n} by `{digest[:12]}`" for digest, n in Counter(one.bundle for one in found).items())
    seconds = ", ".join(f"{one:.1f}" for one in took)
    said = f"{len(found)} requests by {CLIENTS} clients, {failed} failed; {by}; the commands took {seconds} s"
    story.tell("promoted, rolled back and promoted under load", said)


def renewed(story: Story, traffic: Iterator[Prompt], count: int) -> None:
    cleared = until(lambda: not story.fires("CandorCertificateSuspended"), 180)
    found = story.ask_all(traffic, count)
    labelled, stands = story.label("sampled"), story.standing()
    story.tell("the same traffic, by the new bundle", share(found))
    audited = f"of {stands['right'] + stands['wrong']} audits {stands['right']} are right"
    more = f"({labelled} labels more); the alert had ended {cleared:.0f} s after the last change"
    story.tell("its certificate", f"{stands['standing']}: {audited} {more}")


def checks(story: Story, thresholds: dict[str, float]) -> None:
    """Raises RuntimeError unless every verdict names the bundle that gave it, in the response and in the store."""
    database = Database.open(story.store)
    try:
        asked = select(verdicts.c.id, verdicts.c.bundle)
        kept = database.read(lambda connection: {id: digest for id, digest in connection.execute(asked)})
    finally:
        database.close()
    failed = [one.status for one in story.answers if one.status != "200"]
    given = [one for one in story.answers if one.status == "200"]
    wrong = [
        one for one in given if kept.get(one.id) != one.bundle or thresholds[one.bundle] != one.score_min
    ]
    if failed or wrong:
        raise RuntimeError(f"failed: {failed[:5]}; verdicts of another bundle than they name: {wrong[:5]}")
    said = f"{len(given)} requests, {len(failed)} failed, {story.labels} labels; each verdict in the store bears the "
    story.tell("in all", said + "bundle that its response named, and was made with that bundle's threshold")


# What they run on


def first_bundle(path: Path) -> None:
    """Writes the demo's bundle without alpha 0.98: to certify that anew takes 149 answers without a mistake."""
    demo = load_bundle(ROOT / "demo/bundle")
    assert demo.rule is not None
    terms, alphas = demo.rule.terms, tuple(one for one in demo.manifest.alphas if one < 0.98)
    terms = replace(terms, certificates=tuple(one for one in terms.certificates if one.alpha < 0.98))
    estimator = replace(demo.estimator, regions={alpha: demo.estimator.regions[alpha] for alpha in alphas})
    manifest = replace(demo.manifest, rule=terms, alphas=alphas, files={})
    publish(path, manifest, estimator, demo.exemplars, demo.report, demo.rule.rule)


def certified(path: Path) -> tuple[str, RuleCertificate]:
    """Returns the bundle's digest, and its certificate at ALPHA."""
    bundle = load_bundle(path)
    found = bundle.manifest.rule.at(ALPHA) if bundle.manifest.rule else None
    assert found is not None
    return bundle.digest, found


@contextmanager
def prometheus(folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with our rules and alerts, which looks every second at what `targets.json` in its folder names."""
    rules = ("rules.yml", "alerts.yml")
    for name in rules:
        shutil.copy(ROOT / "docker/prometheus" / name, folder / name)
    often = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    scraped = {"job_name": "candor", "file_sd_configs": [{"files": ["targets.json"]}]}
    config = {"global": often, "rule_files": rules, "scrape_configs": [scraped]}
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
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
def candor(story: Story, bundle: Path, folder: Path, **more: str) -> Iterator[Serving]:
    settings = {
        "CANDOR_STORE": story.store,
        "CANDOR_STORE_SPOOL": str(folder / "spool"),
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
        story.url = server.url
        target = [{"targets": [server.url.removeprefix("http://")]}]
        (folder / "targets.json").write_text(json.dumps(target), encoding="utf-8")
        yield server


def main(
    first: Annotated[int, typer.Option(help="Requests before the fall.")] = 160,
    fall: Annotated[float, typer.Option(help="Share of prompts in small letters after it.")] = 0.25,
    audited: Annotated[int, typer.Option(help="Requests between alarm and the next bundle.")] = 1000,
    later: Annotated[int, typer.Option(help="Requests while it shadows, and after it was promoted.")] = 150,
    pause_s: Annotated[float, typer.Option(help="Seconds between changes of the bundle, under load.")] = 4.0,
    screenshots: Annotated[Path | None, typer.Option(help="Folder for pictures of the pages.")] = None,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="candor-story-"))
    old, new, traffic = folder / "old", folder / "new", prompts(fall)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = stack.enter_context(runpy.run_path(str(ROOT / "tests/app/postgres.py"))["running"]())
        watching = stack.enter_context(prometheus(folder))
        story = Story(postgres.database(), watching, stack.enter_context(browser_page()), screenshots)
        first_bundle(old)
        with candor(story, old, folder) as server:
            story.tell(
                "started", f"PostgreSQL, Prometheus, a browser and the server ({server.start_s:.0f} s)"
            )
            calm(story, first)
            fell = time.time()
            falls(story, traffic)
            story.picture("suspended", "/console/")
            audits(story, traffic, audited)
            while not recalibrates(story, old, new, fell):  # each is one more test
                audits(story, traffic, audited // 2)
        with candor(story, old, folder, CANDOR_SHADOW=str(new)) as server:
            stands = story.standing()["standing"]
            story.tell(
                "started again with `--shadow`", f"{server.start_s:.0f} s; the certificate is still {stands}"
            )
            shadows(story, traffic, later)
            changes(story, traffic, pause_s)
            renewed(story, traffic, later)
            story.picture("renewed", "/console/")
        found = dict(map(certified, (old, new)))
        checks(story, {digest: one.score_min for digest, one in found.items()})
    typer.echo("\n".join(story.lines))


if __name__ == "__main__":
    typer.run(main)
