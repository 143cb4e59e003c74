"""Escalation to a second real model: what clients get from one model, from the other, and from both as one policy.

    python -m benchmarks.escalation [--json]

In front stands a small model that was barely taught to judge product reviews, behind it one that was, each in a
vLLM of its own (docs/models.md says how both are made). `candor calibrate --escalate-to` certifies both as one
policy; then held-out reviews are asked of the front server, which puts what it withholds to the other model, and of
the other model alone. At last what stands between a server and the other model hangs, lies about its length, floods
and redirects, and then nobody is behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.servers import Serving, half_of_the_cores, plain_vllm, serving
from benchmarks.walk import engine_double, made_by
from candor.app.commands.serve import EngineKind
from candor.calibration.data import Record, load
from candor.calibration.intervals import Share
from candor.calibration.verifiers import load_verifier

ROOT = Path(__file__).resolve().parent.parent
NAME = "behind"
PORT = 18_970
"""Of the relay. It is always the same, since kept answers are those of an address."""
TIMEOUT_S, FAILURES, PAUSE_S = 3, 5, 3
THIN = [{"role": "user", "content": "thin"}]
ESCALATE = {"mode": "abstain", "on_abstain": "escalate"}
TROUBLE = {
    "hangs": b"",
    "lies about its length": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n{",
    "is endless": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
    "redirects": b"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
}


class Relay:
    """Passes bytes on to `port`, or behaves as `trouble` says."""

    def __init__(self) -> None:
        self.port = 0
        self._trouble: str | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        """Yields its URL. port: 0 for any."""
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", port))
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(5)

    def behave(self, trouble: str | None) -> None:
        """Also ends the connections that are open."""

        def change() -> None:
            self._trouble = trouble
            for writer in self._open:
                writer.close()

        self._loop.call_soon_threadsafe(change)
        time.sleep(0.2)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(ConnectionError):
            if self._trouble is None:
                there, back = await asyncio.open_connection("127.0.0.1", self.port)
                await asyncio.gather(_pass(reader, back), _pass(there, writer))
            else:
                await reader.read(1)
                writer.write(TROUBLE[self._trouble])
                while self._trouble in ("hangs", "is endless") and not writer.is_closing():
                    await asyncio.sleep(0.01)
                    writer.write(b": nothing\n\n" * 1000 if self._trouble == "is endless" else b"")
                    await writer.drain()
        writer.close()
        self._open.discard(writer)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


def ask(
    url: str, model: str, turns: Sequence[Any], reliability: dict[str, Any] | None, *, streamed: bool = False
) -> Any:
    """Returns (the body or the stream's text, seconds)."""
    body: dict[str, Any] = {"model": model, "messages": list(turns)}
    if reliability is None:
        body["max_tokens"] = 8
    else:
        body["reliability"] = reliability
    began = time.monotonic()
    response = httpx.post(
        f"{url}/v1/chat/completions", json=body | {"stream": streamed}, timeout=600, verify=False
    )
    response.raise_for_status()
    return (response.text if streamed else response.json()), time.monotonic() - began


def right(record: Record, text: str | None) -> bool:
    assert record.verifier is not None
    return text is not None and bool(load_verifier(record.verifier, record.folder)(text, record.reference))


def said(body: Any) -> str | None:
    text: str | None = body["choices"][0]["message"]["content"]
    return text


def outcomes(url: str) -> Counter[str]:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    counts: Counter[str] = Counter()
    for line in (line for line in lines if line.startswith("sdm_escalations_total{")):
        counts[line.split('outcome="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return counts


def share(hits: int, of: int) -> str:
    found = Share.from_counts(hits, of)
    if found.value is None:
        return "none"
    return f"{100 * found.value:.1f} % [{100 * (found.low or 0):.1f}, {100 * (found.high or 0):.1f}]"


def main(
    model: Annotated[Path, typer.Option(help="In front.")] = ROOT / "var/models/gemma3-270m-reviews",
    behind: Annotated[Path, typer.Option(help="Behind it.")] = ROOT
    / "var/models/gemma3-270m-reviews-16-epochs",
    data: Annotated[Path, typer.Option(help="To calibrate on.")] = ROOT / "var/reviews/calibration.jsonl",
    test: Annotated[Path, typer.Option(help="Held out.")] = ROOT / "var/reviews/test.jsonl",
    kept: Annotated[Path, typer.Option(help="Answers of the model in front.")] = ROOT / "var/reviews/answers",
    out: Annotated[Path, typer.Option(help="Folder for the bundle; made if it is not there.")] = ROOT
    / "var/escalation",
    engine: Annotated[EngineKind, typer.Option(help="Of both.")] = EngineKind.vllm,
    behind_bundle: Annotated[Path, typer.Option(help="Of the model behind, for the other engine.")] = ROOT
    / "var/reviews/bundle-16-epochs",
    records: Annotated[int, typer.Option(help="To calibrate on, the first.")] = 1440,
    alpha: Annotated[float, typer.Option(help="Accuracy of what the gates let through.")] = 0.9,
    prompts: Annotated[int, typer.Option(help="Of the held-out ones, the first.")] = 700,
    only_trouble: Annotated[
        bool, typer.Option("--only-trouble", help="No models: the last part alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    if only_trouble:
        typer.echo(troubles(trouble()))
        return
    relay = Relay()
    common = {"CANDOR_ENGINE": engine.value, "CANDOR_EAGER": "true", "CANDOR_MAX_MODEL_LEN": "512"}
    common |= {"CANDOR_MAX_NUM_SEQS": "16", "CANDOR_KV_CACHE_BYTES": str(1 << 28)}
    plain = [
        "--enforce-eager",
        "--dtype=bfloat16",
        "--max-model-len=512",
        f"--kv-cache-memory-bytes={1 << 28}",
    ]
    plain += [f"--served-model-name={NAME}", "--max-num-seqs=16"]
    with relay.running(PORT) as url, ExitStack() as behind_it:
        other = behind_it.enter_context(
            plain_vllm(behind, plain, environment=half_of_the_cores(1))
            if engine is EngineKind.vllm
            else serving(behind, behind_bundle, common | {"CANDOR_SERVED_MODEL_NAME": NAME})
        )
        relay.port = int(other.url.rsplit(":", 1)[1])
        calibrate(model, data, records, kept, out, alpha, url, engine)
        settings = (
            common
            | half_of_the_cores(0)
            | {
                "CANDOR_ESCALATE_URL": url,
                "CANDOR_ESCALATE_MODEL": NAME,
                "CANDOR_ESCALATE_TIMEOUT_S": "60",
            }
        )
        asked = load(test).records[:prompts]
        with serving(model, out / "bundle", settings) as front:
            found = measured(front, other, asked, alpha)
    found["certified"] = json.loads((out / "bundle/manifest.json").read_text())["cascade"]
    if not as_json:
        typer.echo(table(found))  # first, since the rest takes minutes more
    found["trouble"] = trouble()
    typer.echo(json.dumps(found) if as_json else "\n" + troubles(found["trouble"]))


def calibrate(
    model: Path, data: Path, records: int, kept: Path, out: Path, alpha: float, url: str, engine: EngineKind
) -> None:
    if (out / "bundle").exists():
        return
    if not (out / "answers").exists():
        shutil.copytree(kept, out / "answers")
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "calibration.jsonl").write_text("".join(lines[:records]), encoding="utf-8")
    command = [sys.executable, "-c", "from candor.app.cli import main; main()", "calibrate", "--eager"]
    command += ["--model", str(model), "--name", "reviews", "--data", str(out / "calibration.jsonl")]
    command += [
        "--alpha",
        str(alpha),
        "--max-tokens",
        "8",
        "--max-model-len",
        "512",
        "--engine",
        engine.value,
    ]
    command += ["--exemplar-dim", "256", "--learning-rate", "1e-4", "--epochs", "100", "--concurrency", "16"]
    command += ["--kv-cache-memory-bytes", str(1 << 28)] if engine is EngineKind.vllm else []
    command += ["--hidden-cache", str(out / "answers"), "--out", str(out / "bundle")]
    command += ["--escalate-to", url, "--escalate-model", NAME]
    subprocess.run(command, check=True, stdout=sys.stderr)


def measured(front: Serving, other: Serving, records: Sequence[Record], alpha: float) -> dict[str, Any]:
    reliability = ESCALATE | {"alpha": alpha}
    with ThreadPoolExecutor(8) as pool:
        both = list(pool.map(lambda one: ask(front.url, "reviews", one.messages, reliability), records))
        alone = list(pool.map(lambda one: ask(other.url, NAME, one.messages, None), records))
    counts: Counter[str] = Counter(of=len(records))
    seconds: dict[str, list[float]] = {"let through": [], "escalated": []}
    withheld = []
    for record, (body, took), (its, _) in zip(records, both, alone, strict=True):
        [result] = body["reliability"]["results"]
        correct = right(record, said(body))
        counts["cascade answered"] += said(body) is not None
        counts["cascade right"] += correct
        counts["other right"] += right(record, said(its))
        if result["abstained"]:
            withheld.append(record.id)
            counts["escalated answered"] += said(body) is not None
            counts["escalated right"] += correct
            counts["certified"] += bool(result["escalated"] and result["escalated"]["certified"])
        else:
            counts["front answered"] += 1
            counts["front right"] += correct
        seconds["escalated" if result["abstained"] else "let through"].append(took)
    medians = {name: statistics.median(took) for name, took in seconds.items() if took}
    return {"counts": counts, "withheld": withheld, "median_s": medians, "outcomes": outcomes(front.url)}


def trouble() -> dict[str, Any]:
    """What becomes of 20 withheld prompts, half of them streams, and when the other model is asked again.

    The engine in front is a scripted one (tests/app), since how an upstream fails depends on no model.
    """
    double = engine_double()
    bundle = replace(made_by(double.bundle)(double.fitted(), double.IDENTITY), rule=made_by(double.gates)())
    engine = double.scripted(double.IDENTITY, bundle)
    engine.script("thin", state="thin")
    relay, found = Relay(), {}
    with relay.running() as url, double.fake_upstream() as fake:
        fake.behaves(double.answers())
        settings = double.make_settings(
            escalate_url=url,
            escalate_model=NAME,
            escalate_timeout_s=TIMEOUT_S,
            escalate_failures=FAILURES,
            escalate_pause_s=PAUSE_S,
        )
        with double.running(engine, bundle, settings) as front:
            for kind in (*TROUBLE, "is dead"):
                relay.port = 9 if kind == "is dead" else fake.port
                relay.behave(None if kind == "is dead" else kind)
                found[kind] = troubled(front.url)
                relay.port = fake.port
                relay.behave(None)
                found[kind]["well_after_s"] = recovered(front.url)
    return found


def troubled(url: str) -> dict[str, Any]:
    """Raises RuntimeError where a prompt gets anything but the refusal."""
    took: list[float] = []
    before = outcomes(url)
    for streamed in (False, True):
        for _ in range(10):
            body, seconds = ask(url, "tiny", THIN, ESCALATE, streamed=streamed)
            refused = '"refusal":"I do not know' in body if streamed else said(body) is None
            if not refused:
                raise RuntimeError(f"expected the refusal, got {body}")
            took.append(seconds)
    return {
        "outcomes": outcomes(url) - before,
        "longest_s": max(took),
        "median_s": statistics.median(took),
    }


def recovered(url: str) -> float:
    """Seconds until the other model's answer is passed on again. Raises RuntimeError after a minute."""
    began = time.monotonic()
    while time.monotonic() - began < 60:
        if said(ask(url, "tiny", THIN, ESCALATE)[0]) is not None:
            return time.monotonic() - began
        time.sleep(0.1)
    raise RuntimeError("the circuit did not close again")


def table(found: dict[str, Any]) -> str:
    counts = found["counts"]
    of = counts["of"]
    rows = [
        ("in front, alone", counts["front answered"], counts["front right"]),
        ("behind, alone", of, counts["other right"]),
        ("behind, on what is withheld", counts["escalated answered"], counts["escalated right"]),
        ("both as a cascade", counts["cascade answered"], counts["cascade right"]),
    ]
    lines = [f"{of} held-out prompts", "", "| | answered | right of the answered |", "|---|---|---|"]
    lines += [
        f"| {name} | {share(answered, of)} | {share(hits, answered)} |" for name, answered, hits in rows
    ]
    lines += ["", f"certified: {json.dumps(found['certified'])}"]
    lines += [f"answers that say so: {counts['certified']}; median seconds {found['median_s']}"]
    return "\n".join(lines)


def troubles(found: dict[str, Any]) -> str:
    lines = ["| the other model | what came of 20 | median s | longest s | answers again after s |"]
    lines += ["|---|---|---|---|---|"]
    for kind, one in found.items():
        came = ", ".join(f"{count} `{name}`" for name, count in one["outcomes"].items() if count)
        lines.append(
            f"| {kind} | {came} | {one['median_s']:.2f} | {one['longest_s']:.2f} "
            f"| {one.get('well_after_s', float('nan')):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
