"""A language model as verifier over HTTP: what it costs, and that a killed run pays for no verdict twice.

    python -m benchmarks.paid_judge --records 200

Another model than the one judged is served, by vLLM's own server, or by `candor serve` with the transformers engine
where a bundle of that model is named (--judge-bundle). Between it and `candor evaluate` stands a counter of requests
and of the tokens that each reply reports. The answers to be judged are kept ones (--answers), so that nothing else is
asked. The command is killed with SIGKILL when half of the verdicts are there, given again, and given once more.
Verdicts on their way when it dies are lost and asked for again: as many as the judge has in flight, at most.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.servers import Serving, bind_all_cores, plain_vllm, serving
from candor.calibration.data import load
from candor.calibration.shapes import Reading

ROOT = Path(__file__).resolve().parents[1]
IN_FLIGHT = 8
RUBRIC = "Right if the answer is the sentence of the reference, word for word."


class Counter(ThreadingHTTPServer):
    """Passes requests on to `target`, and counts them."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.target = target
        self.asked = self.read = self.written = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Counter

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # killed while it asked
            return
        with self.server.lock:
            self.server.asked += 1
        headers = {"content-type": "application/json"}
        reply = httpx.post(self.server.target + self.path, content=body, headers=headers, timeout=600)
        if reply.status_code != 200:
            print(reply.status_code, reply.text[:300], file=sys.stderr)
        usage = reply.json().get("usage") or {}
        with self.server.lock:
            self.server.read += usage.get("prompt_tokens", 0)
            self.server.written += usage.get("completion_tokens", 0)
        try:
            self.send_response(reply.status_code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)
        except OSError:
            pass  # whoever asked is gone

    def log_message(self, format: str, *args: Any) -> None: ...


def judge_server(model: Path, bundle: Path | None, eager: bool) -> AbstractContextManager[Serving]:
    if bundle is not None:
        settings = {"CANDOR_ENGINE": "transformers", "CANDOR_SERVED_MODEL_NAME": "judge"}
        return serving(model, bundle, settings)
    bind_all_cores()
    limits = ["--max-model-len", "1024", "--block-size", "32", "--kv-cache-memory-bytes", str(1 << 30)]
    return plain_vllm(
        model, ["--served-model-name", "judge", *limits, *(["--enforce-eager"] if eager else [])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "var/models/smollm2-135m-word-ordering")
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo/bundle")
    parser.add_argument("--data", type=Path, default=ROOT / "var/demo/test.jsonl")
    parser.add_argument(
        "--answers", type=Path, default=ROOT / "var/demo/answers", help="kept answers to them"
    )
    parser.add_argument("--judge", type=Path, default=ROOT / "var/models/smollm2-135m-instruct")
    parser.add_argument("--judge-bundle", type=Path)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    with (
        TemporaryDirectory() as folder,
        judge_server(given.judge, given.judge_bundle, given.eager) as server,
    ):
        counter, place = Counter(server.url), Path(folder)
        (place / "judge.toml").write_text(
            f'url = "{counter.url}"\nmodel = "judge"\nrubric = "{RUBRIC}"\n'
            f"concurrency = {IN_FLIGHT}\nmax_tokens = 4\n"
        )
        records = load(given.data, Reading()).records[: given.records]
        (place / "data.jsonl").write_text(
            "".join(
                json.dumps({"id": one.id, "messages": one.messages, "reference": one.reference}) + "\n"
                for one in records
            )
        )
        shutil.copytree(given.answers, place / "answers")
        words = [
            *(sys.executable, "-m", "candor.app.cli", "evaluate", "--bundle", given.bundle),
            *("--model", given.model, "--data", place / "data.jsonl", "--verifier", "judge(judge.toml)"),
            *("--hidden-cache", place / "answers", "--json"),
        ]
        command = list(map(str, words))
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while counter.asked < len(records) / 2 and run.poll() is None:
            time.sleep(0.01)
        if run.poll() is not None:
            sys.exit("it ended before it could be killed")
        run.kill()
        run.wait()
        time.sleep(1)
        before = counter.asked
        again = subprocess.run(command, capture_output=True, text=True)
        afterwards = counter.asked - before
        third = subprocess.run(command, capture_output=True, text=True)
        if again.returncode or third.returncode:
            sys.exit(f"{again.stderr[-2000:]}\n{third.stderr[-2000:]}")
        both = before + afterwards
        figures = json.loads(third.stdout)["sets"]["test"]
        print(f"answers to judge                        {len(records)}")
        print(
            f"asked before SIGKILL                    {before}, of which one is the trial before all others"
        )
        print(f"asked by the same command afterwards    {afterwards}")
        print(f"asked twice, on their way at the kill   {both - len(records) - 1} (at most {IN_FLIGHT})")
        print(f"asked by a third run                    {counter.asked - both}")
        print(f"tokens in all                           {counter.read} read, {counter.written} written")
        print(f"right by the judge                      {figures['correct']['hits']} of {figures['records']}")
        print("\n".join(line for line in again.stderr.splitlines() if "was asked" in line))


if __name__ == "__main__":
    main()
