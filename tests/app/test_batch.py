"""`candor batch` against a server that listens: every request is answered once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from candor.app.cli import cli
from candor.app.clients.batch import URLS

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from candor.app.cli import main; main()", "batch"]


def request(custom_id: str, prompt: str = "ask", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": URLS[0],
        "body": {"model": "tiny", "messages": messages, **body},
    }


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    def call(url: str, *options: str) -> Result:
        files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
        return CliRunner().invoke(cli, ["batch", *files, "--url", url, *options])

    return call


def test_every_request_has_its_line(server: Any, run: Any, tmp_path: Path) -> None:
    server.engine.script("far", state="far")
    pair = {"messages": [{"role": "user", "content": "ask"}], "response": "x"}
    wanted = [
        request("a"),
        request("b", "far"),
        request("c", reliability={"mode": "off"}),
        request("d", model="other"),
        {"custom_id": "e", "method": "POST", "url": "/v1/reliability", "body": pair},
    ]
    write(tmp_path / "in.jsonl", wanted)
    done = run(server.url)
    assert done.exit_code == 1  # for one failed
    assert done.stdout == "5 requests: 1 abstained, 2 answered, 1 failed, 1 unchecked\n"
    lines = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert sorted(lines) == ["a", "b", "c", "d", "e"]
    for line in lines.values():
        assert set(line) == {"id", "custom_id", "response", "error"}
        assert set(line["response"]) == {"status_code", "request_id", "body"}
    assert lines["a"]["response"]["body"]["choices"][0]["message"]["content"] == "The answer."
    assert lines["b"]["response"]["body"]["reliability"]["results"][0]["region"] == "ood"
    assert lines["d"]["response"]["status_code"] == 404
    assert lines["d"]["response"]["body"]["error"]["code"] == "model_not_found"


def test_killed_again_and_again_it_answers_each_once(serve: Any, run: Any, tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(120)]
    write(tmp_path / "in.jsonl", [request(name) for name in names])
    out = tmp_path / "out.jsonl"
    with serve() as server:
        server.engine.script("ask", pause_s=0.01)
        arguments = [
            *COMMAND,
            str(tmp_path / "in.jsonl"),
            str(out),
            "--url",
            server.url,
            "--concurrency",
            "4",
        ]
        sizes = []
        for more in (1, 4000, 9000):
            process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
            before = out.stat().st_size if out.exists() else 0
            deadline = time.monotonic() + 30
            while not out.exists() or out.stat().st_size < before + more:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            sizes.append(out.stat().st_size)
        assert 0 < sizes[0] < sizes[1] < sizes[2]
        assert len(out.read_bytes().splitlines()) < len(names)
        kept = out.read_bytes()
        done = run(server.url)
    assert done.exit_code == 0, done.stderr
    assert Counter(line["custom_id"] for line in read(out)) == Counter(names)
    assert out.read_bytes().startswith(kept.rpartition(b"\n")[0])


def test_a_torn_line_is_asked_again(server: Any, run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request("a"), request("b")])
    assert run(server.url).exit_code == 0
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    out.write_bytes(whole[:-5])
    server.engine.asked.clear()
    assert run(server.url).exit_code == 0
    assert len(server.engine.asked) == 1
    assert out.read_bytes()[:first] == whole[:first]
    assert sorted(line["custom_id"] for line in read(out)) == ["a", "b"]
    server.engine.asked.clear()
    assert "2 requests: 2 answered" in run(server.url).stdout
    assert server.engine.asked == []


def test_overload_is_waited_for(serve: Any, run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(f"r{i}") for i in range(6)])
    with serve(max_in_flight=1, max_choices=1) as server:
        server.engine.script("ask", pause_s=0.02)
        done = run(server.url, "--concurrency", "3")
    assert done.stdout == "6 requests: 6 answered\n", done.stderr


def test_what_takes_too_long_is_not_asked_for_ever(serve: Any, run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request("a")])
    with serve(request_timeout_s=0.1) as server:
        server.engine.script("ask", hangs=True)
        done = run(server.url)
    assert done.stdout == "1 request: 1 failed\n", done.stderr
    [line] = read(tmp_path / "out.jsonl")
    assert line["response"]["body"]["error"]["code"] == "deadline_exceeded"


def test_a_server_that_is_gone_is_given_up_and_nothing_is_written(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request("a")])
    done = run("http://127.0.0.1:9", "--patience-s", "0.2")
    assert done.exit_code == 1
    assert "no answer for 0.2 s (ConnectError" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""


POISON = [
    ("{", "line 2: not JSON"),
    ("[]", "line 2: expected an object"),
    (json.dumps(request("a")), "line 2: the custom_id 'a' stands in line 1 too"),
    (json.dumps(request("")), "line 2: expected a custom_id"),
    (json.dumps(request("b") | {"url": "/v1/embeddings"}), "line 2: expected POST to one of"),
    (json.dumps(request("b", stream=True)), "line 2: expected a body, an object, that does not ask"),
    (
        json.dumps(request("b", "emoji \ud83d")),
        "line 2: not JSON that can be sent: 'utf-8' codec can't encode",
    ),
    (
        json.dumps(request("b", temperature=float("nan"))),
        "line 2: not JSON that can be sent: NaN is not JSON",
    ),
    (
        json.dumps(request("b")).replace('"POST"', '"POST", "method": "POST"'),
        'stand twice in one object: "method"',
    ),
    ('{"custom_id": "b", "body": ' + "[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "words"), POISON)
def test_a_line_that_cannot_be_sent_is_an_error_and_the_others_go_on(
    server: Any, run: Any, tmp_path: Path, line: str, words: str
) -> None:
    lines = [json.dumps(request("a")), line, json.dumps(request("c"))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = run(server.url)
    assert (done.exit_code, done.stdout) == (1, "3 requests: 2 answered, 1 failed\n"), done.stderr
    written = read(tmp_path / "out.jsonl")
    [bad] = [line for line in written if line["response"] is None]
    assert bad["error"]["line"] == 2
    assert words in bad["error"]["message"]
    assert sorted(line["custom_id"] for line in written if line["response"]) == ["a", "c"]
    server.engine.asked.clear()
    assert run(server.url).stdout == done.stdout
    assert read(tmp_path / "out.jsonl") == written
    assert server.engine.asked == []


def test_a_file_of_which_no_line_can_be_sent_is_refused(server: Any, run: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("prompt,answer\na,b\n", encoding="utf-8")
    done = run(server.url)
    assert done.exit_code == 1
    assert "no line can be sent; line 1: not JSON" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_are_not_added_to_the_requests(server: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [request("a")])
    (tmp_path / "link").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link"):
        done = CliRunner().invoke(cli, ["batch", str(path), str(out), "--url", server.url])
        assert done.exit_code == 1
        assert "is IN and OUT" in done.stderr
    assert path.read_bytes() == before


def test_results_of_other_requests_are_left_alone(server: Any, run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request("a")])
    out = write(tmp_path / "out.jsonl", [{"custom_id": "other", "response": None}])
    before = out.read_bytes()
    done = run(server.url)
    assert "'other' is not among the requests" in done.stderr
    assert out.read_bytes() == before


def test_two_runs_do_not_share_an_output(server: Any, run: Any, tmp_path: Path) -> None:
    import fcntl

    write(tmp_path / "in.jsonl", [request("a")])
    with (tmp_path / "out.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(server.url)
    assert done.exit_code == 1
    assert "another run is adding" in done.stderr


def test_a_key_is_needed_and_taken_from_the_environment(
    serve: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from candor.app.edge.keys import make_key

    secret, kept = make_key("batch", ["answer"])
    (tmp_path / "keys").write_text(kept.line(), encoding="utf-8")
    write(tmp_path / "in.jsonl", [request("a")])
    with serve(keys=tmp_path / "keys") as server:
        refused = run(server.url)
        assert refused.exit_code == 1
        assert "set CANDOR_API_KEY" in refused.stderr
        monkeypatch.setitem(os.environ, "CANDOR_API_KEY", secret)
        assert run(server.url).exit_code == 0
