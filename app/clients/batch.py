"""`candor batch`: a running server answers a file of requests, in OpenAI's batch format.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out   {"id": ..., "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}

Each line of the output is one write at the end of the file, so a killed command leaves whole lines and at most
one torn line. The next run removes the torn line, skips requests that have a line, and sends the rest. So no line
is lost and none appears twice.

A line that cannot be sent is answered with an error that names it, and the others go on:

    out   {"id": ..., "custom_id": null or its own, "response": null, "error": {"code", "message", "line"}}
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from candor.app.clients.remote import Url, client_settings, explanation
from candor.model_store import strict_json

if TYPE_CHECKING:
    import httpx
    from tqdm import tqdm

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/reliability", "/v1/decisions")
_LATER = (429, 503)
_LONGEST_PAUSE_S = 30.0


class BatchError(Exception):
    """A file cannot be used, or the server does not answer; the message says what to do."""


def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="Requests, JSON Lines.", show_default=False)],
    results: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where answers are added; what is there already is kept.")
    ],
    url: Url = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 32,
    patience_s: Annotated[
        float, typer.Option(min=0, help="Seconds without any answer after which the server is given up.")
    ] = 300,
) -> None:
    """Answer a file of requests in OpenAI's batch format. Run again, it goes on where it was stopped."""
    try:
        if results.exists() and results.samefile(requests):
            raise BatchError(f"{results} is IN and OUT: answers are added to OUT, so give it another name")
        known, faults = check_requests(requests)
        with open_results(results, known) as out:
            for fault in faults:
                if _key(fault) not in out.done:
                    out.add(fault)
            asyncio.run(_answer_all(requests, out, known, url, concurrency, patience_s))
    except (BatchError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. What is answered is kept: the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    typer.echo(out.summary())
    raise typer.Exit(1 if out.tally["failed"] else 0)


def check_requests(path: Path) -> tuple[set[str | int], list[dict[str, Any]]]:
    """Returns the keys of all results (`_key`), and results of the lines that cannot be sent.

    Raises BatchError, which names the first of them, where no line can be sent.
    """
    lines: dict[str, int] = {}
    faults: list[dict[str, Any]] = []
    for number, line in _lines(path):
        custom_id = None
        try:
            one = _parsed(line)
            custom_id = one.get("custom_id")
            _check(one, lines)
        except ValueError as error:
            faults.append(
                {
                    "id": f"batch_req_{uuid.uuid4().hex}",
                    "custom_id": custom_id if isinstance(custom_id, str) else None,
                    "response": None,
                    "error": {
                        "code": "invalid_request",
                        "message": f"line {number}: {error}",
                        "line": number,
                    },
                }
            )
        else:
            lines[one["custom_id"]] = number
    if faults and not lines:
        raise BatchError(f"{path}: no line can be sent; {faults[0]['error']['message']}")
    return {*lines, *(fault["error"]["line"] for fault in faults)}, faults


def _key(result: dict[str, Any]) -> str | int | None:
    """What a result answers: a custom_id, or the number of a line that could not be sent."""
    error = result.get("error")
    key: str | int | None = error.get("line") if isinstance(error, dict) else None
    return key or result.get("custom_id")


def _check(one: dict[str, Any], lines: dict[str, int]) -> None:
    """Raises ValueError for a request that cannot be sent. lines: by custom_id, where it stood before."""
    custom_id = one.get("custom_id")
    fault = None
    if not isinstance(custom_id, str) or not custom_id:
        fault = f"expected a custom_id, a text, got {custom_id!r}"
    elif custom_id in lines:
        fault = f"the custom_id {custom_id!r} stands in line {lines[custom_id]} too; each needs its own"
    elif one.get("method") != "POST" or one.get("url") not in URLS:
        fault = f"expected POST to one of {', '.join(URLS)}, got {one.get('method')!r} to {one.get('url')!r}"
    elif not isinstance(one.get("body"), dict) or one["body"].get("stream"):
        fault = "expected a body, an object, that does not ask for a stream"
    if fault:
        raise ValueError(fault)


@dataclass
class Results:
    """The output, open for appending. done: keys (`_key`) that have a line. tally: count of lines per outcome."""

    file: int
    done: set[str | int | None] = field(default_factory=set)
    tally: Counter[str] = field(default_factory=Counter)

    def add(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        while data:  # a full disk takes a part; the next write raises
            data = data[os.write(self.file, data) :]
        self.count(line)

    def count(self, line: dict[str, Any]) -> None:
        self.done.add(_key(line))
        self.tally[_outcome(line)] += 1

    def summary(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.tally.items()))
        return f"{len(self.done)} request{'' if len(self.done) == 1 else 's'}: {parts or 'none'}"


@contextmanager
def open_results(path: Path, known: set[str | int]) -> Iterator[Results]:
    """known: keys of all results. Raises BatchError if another run writes, or the file does not match."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"another run is adding to {path}; wait for it, or end it") from None
        results = Results(file)
        whole = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break  # a killed run left it torn
                whole += len(line)
                try:
                    one = _parsed(line)
                except ValueError as error:
                    raise BatchError(f"{path}, line {number}: {error}") from None
                if _key(one) not in known or _key(one) in results.done:
                    raise BatchError(
                        f"{path}, line {number}: its custom_id {one.get('custom_id')!r} is not among the "
                        "requests, or answered twice; give another output"
                    )
                results.count(one)
        os.ftruncate(file, whole)
        yield results
    finally:
        os.close(file)


async def _answer_all(
    requests: Path, out: Results, known: set[str | int], url: str, concurrency: int, patience_s: float
) -> None:
    import httpx
    from tqdm import tqdm

    faulty = {key for key in known if isinstance(key, int)}
    lines = (_parsed(line) for number, line in _lines(requests) if number not in faulty)
    todo = (one for one in lines if one["custom_id"] not in out.done)
    total = len(known)
    limits = httpx.Limits(max_connections=concurrency)
    with tqdm(total=total, initial=len(out.done), unit="answer", smoothing=0.1) as bar:
        async with httpx.AsyncClient(**client_settings(url), limits=limits) as client:
            asking = _BatchRun(client, out, bar, patience_s)
            workers = min(concurrency, total - len(out.done))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(asking.work(todo))
            except ExceptionGroup as several:  # the first error ended the other tasks
                raise several.exceptions[0] from None


class _BatchRun:
    """Repeats each request until its final answer; it waits while the server is overloaded or restarts."""

    def __init__(self, client: httpx.AsyncClient, out: Results, bar: tqdm[Any], patience_s: float) -> None:
        self._client = client
        self._out = out
        self._bar = bar
        self._patience_s = patience_s
        self._heard = asyncio.get_running_loop().time()

    async def work(self, todo: Iterator[dict[str, Any]]) -> None:
        for one in todo:
            response = await self._answer(one)
            self._out.add(
                {
                    "id": f"batch_req_{uuid.uuid4().hex}",
                    "custom_id": one["custom_id"],
                    "response": {
                        "status_code": response.status_code,
                        "request_id": response.headers.get("x-request-id"),
                        "body": _body(response),
                    },
                    "error": None,
                }
            )
            self._bar.update()
            self._bar.set_postfix(self._out.tally, refresh=False)

    async def _answer(self, one: dict[str, Any]) -> httpx.Response:
        import httpx

        pause_s = 0.5
        while True:
            try:
                response = await self._client.post(one["url"], json=one["body"])
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code in (401, 403):
                    raise BatchError(f"{explanation(response)}; set CANDOR_API_KEY")
                if response.status_code not in _LATER or _took_too_long(response):
                    self._heard = asyncio.get_running_loop().time()
                    return response
                trouble = explanation(response)
                pause_s = max(pause_s, _seconds(response.headers.get("retry-after", "")))
            if asyncio.get_running_loop().time() - self._heard > self._patience_s:
                raise BatchError(
                    f"no answer for {self._patience_s:g} s ({trouble}). What is answered is kept: start the server, "
                    "and the same command goes on from here"
                )
            await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
            pause_s *= 2


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _parsed(line: bytes) -> dict[str, Any]:
    """Raises ValueError, also for what cannot be sent on: half a surrogate pair, NaN, a key twice, too deep."""
    try:
        one = strict_json.parse(line)
    except ValueError as error:
        raise ValueError(f"not JSON that can be sent: {error}") from None
    if not isinstance(one, dict):
        raise ValueError(f"expected an object, got {type(one).__name__}")
    return one


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {
            "error": {"message": response.text[:1000], "type": "server_error", "param": None, "code": None}
        }


def _outcome(line: dict[str, Any]) -> str:
    """Returns answered, abstained, unchecked (mode off) or failed."""
    response = line.get("response") or {}
    if response.get("status_code") != 200:
        return "failed"
    results = (response["body"].get("reliability") or {}).get("results")
    if not results:
        return "unchecked"
    return "abstained" if any(result["abstained"] for result in results) else "answered"


def _took_too_long(response: httpx.Response) -> bool:
    """Says whether the server's deadline passed: a repeated request would take as long again."""
    body = _body(response)
    return isinstance(body, dict) and (body.get("error") or {}).get("code") == "deadline_exceeded"


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0
