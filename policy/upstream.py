"""The upstream of a cascade: a model behind an OpenAI-compatible API that answers what is withheld here.

    asked    POST URL/chat/completions (a plain prompt: URL/completions) with model, conversation, max_tokens, stream
    told     a completion, whole or as server-sent events: pieces of text, then `Ended`

Calibration and server ask through this code alone, so what was certified is what is asked. What comes back is not
trusted: its bytes, its time and its form are bounded, its JSON is strict, redirects, compression and cookies are
refused, and the environment names no proxy. Whatever is not a whole answer is an `UpstreamError`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from candor.policy.conversation import Turn

if TYPE_CHECKING:
    import httpx

Asked = str | Sequence[Turn]
"""What an upstream is asked: a plain prompt, or a conversation with its system prompt."""

Failure = Literal["withheld", "rejected", "unavailable", "timeout", "invalid"]
"""withheld: it refused to answer, or said nothing. rejected: it takes no such request (4xx). unavailable: away, busy
or broken (connection, 408, 425, 429, 5xx); worth another try. invalid: what it sent is no whole answer."""

_LATER = (408, 425, 429)
_CONNECT_S = 10.0
_MOST_BYTES = 1 << 16
_BYTES_PER_TOKEN = 2048
"""A streamed token has some 300 bytes of JSON around it."""
_LONGEST_EVENT = 1 << 16
_LONGEST_RETRY_AFTER_S = 60.0


class UpstreamError(Exception):
    """The upstream gave no answer. retry_after_s: how long it asks to be left alone, if it said so."""

    def __init__(self, failure: Failure, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.failure = failure
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Ended:
    """The end of a whole answer. prompt_tokens, completion_tokens: by the upstream's count, None if it gave none."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Upstream:
    """url: of the API, up to /v1. model: the name that it is asked by. key_file: holds the API key; None: no key.

    Raises ValueError for a URL of another kind, and OSError or ValueError for a file without a key.
    """

    url: str
    model: str
    key_file: Path | None = None

    def __post_init__(self) -> None:
        import httpx

        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"expected http(s)://HOST/v1, got {self.url!r}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
            raise ValueError("expected http(s)://HOST/v1, without a user, a password or a query")
        if not self.model.strip():
            raise ValueError("expected the name of a model")
        self.headers()

    def headers(self) -> dict[str, str]:
        """Returns the authorisation, read anew, so that a key may be changed. Raises OSError or ValueError."""
        if self.key_file is None:
            return {}
        key = self.key_file.read_text(encoding="utf-8").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"{self.key_file} holds no API key: expected one line of printable ASCII")
        return {"authorization": f"Bearer {key}"}

    def client(self, connections: int) -> httpx.AsyncClient:
        """Returns a client for `ask`; its owner closes it. connections: the most at once."""
        import httpx

        client = httpx.AsyncClient(
            # No proxy and no .netrc from the environment; SSL_CERT_FILE may name certificates of one's own.
            trust_env=False,
            verify=httpx.create_ssl_context(),
            follow_redirects=False,
            headers={"accept-encoding": "identity", "user-agent": "candor"},
            limits=httpx.Limits(max_connections=connections),
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
        )
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # they would link users
        return client

    async def ask(
        self, client: httpx.AsyncClient, asked: Asked, max_tokens: int, until: float, *, streamed: bool
    ) -> AsyncGenerator[str | Ended, None]:
        """Yields the text in pieces, as they come if it is streamed, then `Ended`. One try.

        until: by the event loop's clock. Raises UpstreamError, also in the middle of a text.
        """
        import httpx

        kind = {"prompt": asked} if isinstance(asked, str) else {"messages": list(asked)}
        body = {"model": self.model, **kind, "max_tokens": max_tokens, "stream": streamed}
        if streamed:
            body["stream_options"] = {"include_usage": True}
        path = "/completions" if isinstance(asked, str) else "/chat/completions"
        response: httpx.Response | None = None
        reading = _Reading()
        try:
            request = client.build_request(
                "POST", self.url.rstrip("/") + path, json=body, headers=self.headers()
            )
            async with asyncio.timeout_at(until):
                response = await client.send(request, stream=True)
            _check(response)
            most = _MOST_BYTES + _BYTES_PER_TOKEN * max_tokens
            async with aclosing(_chunks(response, most, until)) as chunks:
                async with aclosing(_events(response, chunks)) as events:
                    async for event in events:
                        if text := reading.text(event):
                            yield text
        except TimeoutError:
            if reading.finish_reason is None:  # else the answer is whole, and its count alone is late
                raise UpstreamError("timeout", "it did not answer in time") from None
        except httpx.RemoteProtocolError as error:
            if reading.finish_reason is None:
                raise UpstreamError(
                    "unavailable" if response is None else "invalid", f"it broke off: {error}"
                ) from error
        except (httpx.RequestError, OSError, ValueError) as error:
            if reading.finish_reason is None:
                raise UpstreamError("unavailable", f"{type(error).__name__}: {error}") from error
        finally:
            if response is not None:
                await response.aclose()
        yield reading.ended()


def _check(response: httpx.Response) -> None:
    """Raises UpstreamError unless an answer follows."""
    status, headers = response.status_code, response.headers
    if status in _LATER or status >= 500:
        said = headers.get("retry-after", "")
        seconds = float(said) if said.isdecimal() and len(said) < 6 else 0.0
        raise UpstreamError("unavailable", f"status {status}", min(seconds, _LONGEST_RETRY_AFTER_S))
    if 400 <= status < 500:
        raise UpstreamError("rejected", f"status {status}")
    if status != 200:
        raise UpstreamError("invalid", f"status {status}; redirects are not followed")
    if headers.get("content-encoding", "identity") != "identity":
        raise UpstreamError("invalid", "it compressed its answer, though asked not to")


async def _chunks(response: httpx.Response, most: int, until: float) -> AsyncGenerator[bytes, None]:
    """Yields the body's bytes, at most `most` of them. Raises UpstreamError or TimeoutError."""
    raw, seen = response.aiter_raw(), 0
    while True:
        async with asyncio.timeout_at(until):
            chunk = await anext(raw, b"")
        if not chunk:
            return
        seen += len(chunk)
        if seen > most:
            raise UpstreamError("invalid", f"its answer has more than {most} bytes")
        yield chunk


async def _events(
    response: httpx.Response, chunks: AsyncGenerator[bytes, None]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the objects of an event stream, or the one object that a whole body is. Raises UpstreamError."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield _object(b"".join([chunk async for chunk in chunks]))
        return
    if kind != "text/event-stream":
        raise UpstreamError("invalid", f"it sent {kind[:60]!a} in place of JSON or events")
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_EVENT:
            raise UpstreamError("invalid", f"one of its events has more than {_LONGEST_EVENT} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield _object(data)


class _Reading:
    """Reads the objects of one answer, in their order."""

    def __init__(self) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self._said = False
        self._tokens: dict[str, int | None] = {"prompt_tokens": None, "completion_tokens": None}

    def text(self, event: dict[str, Any]) -> str:
        """Returns the text that one object adds. Raises UpstreamError."""
        if event.get("error") is not None:
            raise UpstreamError("unavailable", "it reports an error of its own")
        if isinstance(usage := event.get("usage"), dict):
            self._tokens = {name: _count(usage.get(name)) for name in self._tokens}
        choices = event.get("choices")
        if choices == []:  # the chunk with the usage
            return ""
        if not isinstance(choices, list) or not isinstance(choice := choices[0], dict):
            raise UpstreamError("invalid", "an object without choices")
        if self.finish_reason is not None:
            raise UpstreamError("invalid", "more text after the end")
        said = next((choice[name] for name in ("message", "delta") if name in choice), choice)
        if not isinstance(said, dict):
            raise UpstreamError("invalid", "a choice without a message")
        if said.get("refusal") or choice.get("refusal") or choice.get("finish_reason") == "content_filter":
            raise UpstreamError("withheld", "it refused to answer")
        text = said.get("text" if said is choice else "content")
        if not isinstance(text, str | None):
            raise UpstreamError("invalid", "a text that is none")
        match choice.get("finish_reason"):
            case "stop" | "length" as reason:
                self.finish_reason = reason
            case None:
                pass
            case _:
                raise UpstreamError("invalid", "an end of an unknown kind")
        self._said |= bool(text)
        return text or ""

    def ended(self) -> Ended:
        """Raises UpstreamError if it is not whole."""
        if self.finish_reason is None:
            raise UpstreamError("invalid", "it ended without saying that it had")
        if not self._said:
            raise UpstreamError("withheld", "it said nothing")
        return Ended(self.finish_reason, self._tokens["prompt_tokens"], self._tokens["completion_tokens"])


def _object(data: bytes) -> dict[str, Any]:
    """Raises UpstreamError unless it is a JSON object of Unicode text and finite numbers."""
    try:
        value = json.loads(data, parse_constant=_refuse)
        # Half a surrogate pair can be escaped in JSON; a client's UTF-8 cannot take it.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UpstreamError("invalid", f"no JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise UpstreamError("invalid", "JSON, but no object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 31 else None
