"""An upstream that behaves as a test says, on a loopback port: a socket, so that it may lie about HTTP itself too."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Behaviour = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Asked:
    """One request. headers: names in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FakeUpstream:
    """Answers each request by the next of `behaviours`; the last one stays."""

    behaviours: list[Behaviour] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    closed: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def behaves(self, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            pairs = (line.split(": ", 1) for line in lines[1:] if line)
            headers = {name.lower(): value for name, value in pairs}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.asked.append(Asked(lines[0].split()[1], headers, body))
            behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
            await behaviour(writer, body)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.closed += 1
            writer.close()


@contextmanager
def fake_upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.serve, "127.0.0.1", 0))
    fake.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def end() -> None:
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def raw(data: bytes) -> Behaviour:
    """Sends these bytes and closes the connection."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(data)
        await writer.drain()

    return behave


def reply(status: int, content: bytes, kind: str = "application/json", *headers: str) -> Behaviour:
    lines = [f"HTTP/1.1 {status} Said", f"content-type: {kind}", f"content-length: {len(content)}", *headers]
    return raw("\r\n".join([*lines, "connection: close", "", ""]).encode() + content)


def completion(text: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """A whole completion, for a conversation and for a plain prompt alike."""
    choice = {
        "index": 0,
        "text": text,
        "message": {"content": text, **message},
        "finish_reason": finish_reason,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def whole(text: Any, finish_reason: Any = "stop", **message: Any) -> Behaviour:
    """A whole completion in the form that was asked for."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        said = completion(text, finish_reason, **message)
        said["choices"][0].pop("message" if "prompt" in body else "text")
        await reply(200, json.dumps(said).encode())(writer, body)

    return behave


def events(*data: str, done: bool = True, pause_s: float = 0.0, hangs: bool = False) -> Behaviour:
    """An event stream of these data, one after another, chunked as HTTP says."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for one in (*data, *(["[DONE]"] if done else [])):
            line = f"data: {one}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
            await asyncio.sleep(pause_s)
        if hangs:
            await asyncio.sleep(3600)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return behave


def pieces(texts: Sequence[str], finish_reason: str | None = "stop", **how: Any) -> Behaviour:
    """A stream of these pieces, in the form that was asked for, with its usage at the end."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        def choice(text: str | None, reason: str | None) -> str:
            said = {"text": text or ""} if "prompt" in body else {"delta": {"content": text} if text else {}}
            return json.dumps({"choices": [{"index": 0, **said, "finish_reason": reason}]})

        last = [choice(None, finish_reason)] if finish_reason else []
        usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts)}})
        await events(*(choice(text, None) for text in texts), *last, usage, **how)(writer, body)

    return behave


def answers(text: str = "Theirs.") -> Behaviour:
    """The text, as a stream of single letters or whole, as it is asked for."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await (pieces(text) if body["stream"] else whole(text))(writer, body)

    return behave


async def hangs(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Never says a word."""
    await asyncio.sleep(3600)
