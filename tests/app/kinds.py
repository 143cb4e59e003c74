"""131 more hostile inputs, each of a kind of its own, over every route: bytes as they go over the connection.

`hostile.py` has wrong values in every field; these are the protocol itself, paths, headers, and bodies that are well
formed and mean harm. `status`: what may come back (0: the connection is closed without an answer).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

HOST = b"host: localhost\r\n"
MESSAGES = [{"role": "user", "content": "ask"}]
CHAT = "/v1/chat/completions"
BAD = (400,)
UNKNOWN = (404,)
FINE = (200,)
REFUSED_OR_FINE = (200, 400, 422, 501)
"""Fields of vLLM's: refused by a server without vLLM, and by one with it as vLLM would."""


class Input(NamedTuple):
    name: str
    raw: bytes
    status: tuple[int, ...]


def get(path: str | bytes, headers: bytes = b"", method: bytes = b"GET") -> bytes:
    path = path.encode() if isinstance(path, str) else path
    return method + b" " + path + b" HTTP/1.1\r\n" + HOST + b"connection: close\r\n" + headers + b"\r\n"


def post(path: str, body: Any, headers: bytes = b"", kind: bytes = b"application/json") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"POST " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"connection: close\r\n"
    return (
        head
        + b"content-type: "
        + kind
        + b"\r\ncontent-length: "
        + str(len(content)).encode()
        + b"\r\n"
        + headers
        + b"\r\n"
        + content
    )


def chat(headers: bytes = b"", **more: Any) -> bytes:
    return post(CHAT, {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **more}, headers)


def protocol() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    """What is no HTTP, or two kinds of HTTP at once."""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"ask"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"content-type: application/json\r\n"
    length = b"content-length: " + str(len(body)).encode() + b"\r\n"
    chunked = b"transfer-encoding: chunked\r\n"
    yield (
        "both lengths (smuggling)",
        head + length + chunked + b"\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
        (400, 0),
    )
    yield "two lengths that differ", head + length + b"content-length: 3\r\n\r\n" + body, BAD
    yield "a negative length", head + b"content-length: -1\r\n\r\n" + body, BAD
    yield "a length with a sign", head + b"content-length: +5\r\n\r\n" + body, BAD
    yield "a length in hexadecimal", head + b"content-length: 0x20\r\n\r\n" + body, BAD
    yield "a length beyond 64 bits", head + b"content-length: " + b"9" * 40 + b"\r\n\r\n" + body, (400, 413)
    yield "a chunk's size that is none", head + chunked + b"\r\nzz\r\n" + body, (400, 0)
    yield "a chunk of 2^64 bytes", head + chunked + b"\r\nffffffffffffffffff\r\n" + body, (400, 413, 0)
    yield (
        "chunks with endless extensions",
        head + chunked + b"\r\n1;" + b"a" * 200_000 + b"\r\n",
        (400, 413, 431, 0),
    )
    yield "20,000 chunks of a byte", head + chunked + b"\r\n" + b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n", BAD
    yield "trailers after the chunks", head + chunked + b"\r\n0\r\nauthorization: x\r\n\r\n", BAD
    yield (
        "an unknown transfer coding",
        head + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        (400, 501),
    )
    yield "chunked, in disguise", head + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", (400, 501, 0)
    yield "blank before the colon", b"GET /livez HTTP/1.1\r\nhost : localhost\r\n\r\n", BAD
    yield "a folded header", b"GET /livez HTTP/1.1\r\n" + HOST + b"x: a\r\n b\r\n\r\n", (200, 400)
    yield "a zero byte in a header", get("/livez", b"x: a\x00b\r\n"), BAD
    yield "a bare carriage return", get("/livez", b"x: a\rx-y: b\r\n"), BAD
    yield (
        "a bare line feed ends the head",
        b"GET /livez HTTP/1.1\n" + HOST.replace(b"\r", b"") + b"\n",
        (200, 400),
    )
    yield "no host", b"GET /livez HTTP/1.1\r\n\r\n", (200, 400)
    yield "two hosts", b"GET /livez HTTP/1.1\r\n" + HOST + b"host: evil.example\r\n\r\n", (200, 400)
    yield "another host", b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n", (400, 421)
    yield "a host that is none", b"GET /v1/models HTTP/1.1\r\nhost: [::1\r\n\r\n", (400, 421)
    yield "HTTP/0.9", b"GET /livez\r\n\r\n", (200, 400, 0)
    yield "HTTP/9.9", b"GET /livez HTTP/9.9\r\n" + HOST + b"\r\n", (400, 505)
    yield "HTTP/2 begins", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)
    yield "TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, (400, 0)
    yield "SSH to a plain port", b"SSH-2.0-OpenSSH_9.2\r\n", (400, 0)
    yield "a whole URL", get("http://evil.example/livez"), (200, 400, 404, 421)
    yield "CONNECT", get("localhost:22", method=b"CONNECT"), (400, 404, 405, 501)
    yield "TRACE", get("/livez", b"cookie: secret\r\n", b"TRACE"), (405,)
    yield "a method of 10,000 letters", get("/livez", method=b"A" * 10_000), (400, 405)
    yield "OPTIONS *", get("*", method=b"OPTIONS"), (400, 404, 405)
    yield "an upgrade to a web socket", get("/v1/chat/completions", _UPGRADE), (400, 405, 426)
    yield "an upgrade to HTTP/2", get("/livez", b"connection: upgrade\r\nupgrade: h2c\r\n"), (200, 400)
    yield (
        "expects to go on, and does not",
        head + length + b"expect: 100-continue\r\nconnection: close\r\n\r\n" + body,
        FINE,
    )
    yield "expects what there is not", chat(b"expect: 200-ok\r\n"), (200, 417)
    yield "PROXY protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get("/livez"), (400, 0)


_UPGRADE = (
    b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n"
)


def paths() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    yield "up from the console", get("/console/../../../etc/passwd"), UNKNOWN
    yield "up, encoded", get("/console/%2e%2e/%2e%2e/etc/passwd"), UNKNOWN
    yield "up, encoded twice", get("/console/%252e%252e/etc/passwd"), UNKNOWN
    yield "up, in overlong UTF-8", get("/console/%c0%ae%c0%ae/etc/passwd"), UNKNOWN
    yield "a zero byte in a path", get("/console/app.js%00.html"), (400, 404)
    yield "backslashes", get("/console/..\\..\\etc\\passwd"), UNKNOWN
    yield "an absolute file", get("/console//etc/passwd"), UNKNOWN
    yield "a scheme that opens files", get("/console/file:///etc/passwd"), UNKNOWN
    yield "a matrix parameter", get("/metrics;a=b"), UNKNOWN
    yield "slashes before a route", get("//metrics"), UNKNOWN
    yield "a route in capitals", get("/V1/MODELS"), UNKNOWN
    yield "bytes above ASCII", get(b"/v1/models/\xff\xfe"), (400, 404)
    yield "line feeds, encoded", get("/v1/models/a%0d%0aset-cookie:%20x=y"), UNKNOWN
    yield "a model's name of 60,000 letters", get("/v1/models/" + "a" * 60_000), (404, 414)
    yield "an answer that is nobody's", get("/v1/reliability/answers/" + "%27%20OR%201=1--"), (400, 404, 503)
    yield "a response of another's", get("/v1/responses/resp_0"), (400, 404)
    yield "a query of 5,000 parameters", get("/v1/reliability?" + "a=b&" * 5_000), (200, 400, 414)
    yield "a model named twice", get("/v1/reliability?model=tiny&model=x"), (200, 404)
    yield "a model's name in a query that is none", get("/v1/reliability?model=%ff%00"), UNKNOWN
    yield "a script in a query", get("/docs?x=<script>alert(1)</script>"), (200, 307, 400)
    yield (
        "a queue without end",
        get("/v1/reliability/queue?kind=sampled&limit=99999999999999999999"),
        (400, 404, 503),
    )
    yield (
        "a probe asked for with a body",
        get("/readyz?deep=perhaps", b"content-length: 3\r\n") + b"abc",
        (200, 400),
    )
    yield "POST where only GET is", post("/metrics", b""), (405,)
    yield "DELETE a model", get("/v1/models/tiny", method=b"DELETE"), (405,)


def headers() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    yield "a time that is no number", chat(b"x-request-timeout: NaN\r\n"), BAD
    yield "a time without end", chat(b"x-request-timeout: Infinity\r\n"), (200, 400)
    yield "a time before now", chat(b"x-request-timeout: -1\r\n"), BAD
    yield "a time in other digits", chat("x-request-timeout: ١٢\r\n".encode()), (200, 400)
    yield "an id of 8,000 letters", chat(b"x-request-id: " + b"a" * 8_000 + b"\r\n"), (200, 400)
    yield "an id with quotes and escapes", chat(b'x-request-id: "\\u0000\x1b[2J"}\r\n'), (200, 400)
    yield "a trace that is none", chat(b"traceparent: 00-zz-zz-zz\r\ntracestate: =,=,=\r\n"), FINE
    yield "a key of bytes above ASCII", chat(b"authorization: Bearer \xff\xfe\r\n"), (200, 401)
    yield "two keys", chat(b"authorization: Bearer a\r\nauthorization: Bearer b\r\n"), (200, 400, 401)
    yield "another method than it says", chat(b"x-http-method-override: DELETE\r\n"), FINE
    yield "an address of another's", chat(b"x-forwarded-for: 127.0.0.1\r\nforwarded: for=x\r\n"), FINE
    yield "a range of an answer", get("/console", b"range: bytes=0-0,0-0,0-0\r\n"), (200, 206, 307, 416)
    yield (
        "a range with 2,000 parts",
        get("/console/", b"range: bytes=" + b"0-," * 2_000 + b"0-\r\n"),
        (200, 206, 400, 404, 416),
    )
    yield "accepts nothing known", get("/metrics", b"accept: text/plain; version=abc; q=x\r\n"), FINE
    yield "a cookie of 7,000 bytes", get("/livez", b"cookie: " + b"a=b; " * 1_400 + b"\r\n"), (200, 431)
    yield (
        "from another page",
        chat(b"origin: https://evil.example\r\nsec-fetch-site: cross-site\r\n"),
        (200, 403),
    )
    yield "asks whether another page may", get(CHAT, _PREFLIGHT, b"OPTIONS"), (400, 403, 405)


_PREFLIGHT = b"origin: https://evil.example\r\naccess-control-request-method: POST\r\n"


def contents() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    """Bodies in another form than JSON in UTF-8."""
    body = {"model": "tiny", "messages": MESSAGES}
    bomb = gzip.compress(b" " * 50_000_000)
    yield "a gzip bomb", post(CHAT, bomb, b"content-encoding: gzip\r\n"), (400, 415)
    yield (
        "deflate, three times",
        post(CHAT, zlib.compress(zlib.compress(bomb)), b"content-encoding: deflate\r\n"),
        (400, 415),
    )
    yield (
        "UTF-16",
        post(CHAT, json.dumps(body).encode("utf-16"), kind=b"application/json; charset=utf-16"),
        BAD,
    )
    yield "a byte order mark", post(CHAT, b"\xef\xbb\xbf" + json.dumps(body).encode()), (200, 400)
    yield (
        "a form with files",
        post(
            CHAT,
            b"--a\r\ncontent-disposition: form-data; name=x\r\n\r\n\r\n--a--",
            kind=b"multipart/form-data; boundary=a",
        ),
        (400, 415),
    )
    yield "a form without a boundary", post(CHAT, b"x", kind=b"multipart/form-data"), (400, 415)
    yield "a kind of 6,000 letters", post(CHAT, body, kind=b"application/" + b"a" * 6_000), (200, 400, 415)
    yield (
        "the same key twice",
        post(CHAT, b'{"model":"tiny","model":"x","messages":[{"role":"user","content":"a"}]}'),
        (400, 404),
    )
    yield (
        "keys that collide",
        post(
            CHAT,
            b'{"model":"tiny","messages":[],'
            + b",".join(b'"%d":0' % (n * (2**61 - 1)) for n in range(3_000))
            + b"}",
        ),
        BAD,
    )
    yield "a prototype", chat(**{"__proto__": {"admin": True}}), BAD
    yield "names of Python's", chat(**{"__class__": "x", "__init__": {}}), BAD


def meaning() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    """Well formed, and meant to reach beyond what was asked."""
    picture = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}
    ]
    file = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    yield "a picture from inside", chat(messages=picture), BAD
    yield "a picture from this disk", chat(messages=file), BAD
    yield "a template of the client's", chat(chat_template="{% for x in range(10**9) %}{% endfor %}"), BAD
    yield (
        "a template's arguments that call",
        chat(chat_template_kwargs={"tools": "{{ 7*7 }}", "messages": []}),
        REFUSED_OR_FINE,
    )
    yield "a schema that refers to itself", _schema({"$ref": "#"}), REFUSED_OR_FINE
    yield "a schema from elsewhere", _schema({"$ref": "http://169.254.169.254/schema.json"}), REFUSED_OR_FINE
    yield "a schema that doubles 40 times", _schema(_doubling(40)), REFUSED_OR_FINE
    yield (
        "a pattern that backtracks",
        _schema({"type": "string", "pattern": "^(a|a)*(a|aa)+$"}),
        REFUSED_OR_FINE,
    )
    yield (
        "a pattern that is counted thrice",
        _schema({"type": "string", "pattern": "((a{1,90}){1,90}){1,90}"}),
        BAD,
    )
    yield (
        "many patterns that are counted",
        _schema({"properties": {f"p{n}": {"pattern": "(a{1,100}){1,50}"} for n in range(300)}}),
        BAD,
    )
    yield "a text of a billion letters", _schema({"type": "string", "minLength": 10**9}), BAD
    yield "a list of a million things", _schema({"type": "array", "minItems": 10**6}), BAD
    yield (
        "a schema with 9,000 properties",
        _schema({"properties": {f"p{n}": {"type": "string"} for n in range(9_000)}}),
        BAD,
    )
    yield "a regular expression with a zero byte", chat(structured_outputs={"regex": "a\x00b"}), BAD
    yield (
        "a grammar that calls itself first",
        chat(structured_outputs={"grammar": 'root ::= root "a" | "b"'}),
        REFUSED_OR_FINE,
    )
    yield "a grammar without a root", chat(structured_outputs={"grammar": 'a ::= "b"'}), BAD
    yield "two grammars at once", chat(structured_outputs={"regex": "a", "choice": ["b"]}), BAD
    yield "a structural tag that is none", chat(structured_outputs={"structural_tag": '{"type":"x"}'}), BAD
    yield (
        "a tool whose name ends a line",
        chat(tools=[{"type": "function", "function": {"name": "a\n<|im_end|>", "parameters": {}}}]),
        REFUSED_OR_FINE,
    )
    yield (
        "a tool that must be called and is not there",
        chat(tool_choice={"type": "function", "function": {"name": "x"}}),
        BAD,
    )
    yield (
        "tokens that there are not",
        post("/v1/completions", {"model": "tiny", "prompt": [0, -1, 2**31, 2**63]}),
        BAD,
    )
    yield "a bias on tokens that there are not", chat(logit_bias={"999999999": 100}), BAD
    yield "only tokens that there are not", chat(allowed_token_ids=[10**9]), BAD
    yield "to end at tokens that there are not", chat(stop_token_ids=[-1, 2**40]), REFUSED_OR_FINE
    yield "at least more than at most", chat(min_tokens=500), BAD
    yield "words that may not come, empty", chat(bad_words=["", "\x00"]), REFUSED_OR_FINE
    yield "a priority above all", chat(priority=-(2**62)), REFUSED_OR_FINE
    yield "another's cache", chat(cache_salt="x" * 100_000), REFUSED_OR_FINE
    yield (
        "a cache from elsewhere",
        chat(kv_transfer_params={"remote_host": "evil.example", "remote_port": 1}),
        BAD,
    )
    yield (
        "to detokenise what there is not",
        post("/detokenize", {"model": "tiny", "tokens": [2**40, -5]}),
        (400, 404),
    )
    yield (
        "to tokenise a megabyte",
        post("/tokenize", {"model": "tiny", "prompt": "ab " * 330_000}),
        (200, 400, 404, 413),
    )
    yield (
        "an earlier response that is a path",
        post("/v1/responses", {"model": "tiny", "input": "a", "previous_response_id": "../../x"}),
        (400, 404),
    )
    yield (
        "a message in Anthropic's form without an end",
        post("/v1/messages", {"model": "tiny", "max_tokens": 10**12, "messages": MESSAGES}),
        (400, 404),
    )
    yield (
        "401 decisions",
        post(
            "/v1/decisions",
            {"model": "tiny", "input": "a", "questions": [{"type": "predicate", "instructions": "x"}] * 401},
        ),
        BAD,
    )
    yield (
        "a choice of one thing, 5,000 times",
        post(
            "/v1/decisions",
            {
                "model": "tiny",
                "input": "a",
                "questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}] * 5_000}],
            },
        ),
        BAD,
    )
    yield (
        "feedback on what is no answer",
        post("/v1/reliability/feedback", {"id": "'; DROP TABLE verdicts; --", "correct": True}),
        (400, 404, 503),
    )
    yield (
        "feedback on choice 2^63",
        post("/v1/reliability/feedback", {"id": "x", "index": 2**63, "correct": True}),
        (400, 404),
    )
    yield (
        "to promote a bundle that is a path",
        post("/bundles/promote", {"bundle": "../../../../etc"}),
        (400, 404, 409),
    )
    several = {"model": "tiny", "max_tokens": 2, "prompt": ["the old man by the sea " * 60] * 16}
    yield "sixteen long prompts at once", post("/v1/completions", several), (200, 400)
    slow = {"regex": "(a|b|c){1,400}.{1,100}x"}
    yield "a regular expression that compiles slowly", chat(structured_outputs=slow), REFUSED_OR_FINE
    wide = {"properties": {f"p{n}": {"type": "string", "maxLength": 999} for n in range(900)}}
    yield "a tool with 900 parameters that must be called", _tool(wide), REFUSED_OR_FINE
    yield "SageMaker's route with nothing", post("/invocations", {}), BAD


def _schema(inner: Any) -> bytes:
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": inner}}
    return chat(response_format=asked)


def _tool(parameters: Any) -> bytes:
    called = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}
    return chat(tools=[called], tool_choice="required")


def _doubling(times: int) -> dict[str, Any]:
    parts: dict[str, Any] = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(times)
    }
    return {"$defs": parts | {f"d{times}": {"type": "string"}}, "$ref": "#/$defs/d0"}


INPUTS = tuple(
    Input(f"{kind.__name__}: {name}", raw, status)
    for kind in (protocol, paths, headers, contents, meaning)
    for name, raw, status in kind()
)
