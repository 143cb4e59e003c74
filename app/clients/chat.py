"""`candor chat`: a conversation in the terminal, with the verdict below each answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from candor.app.clients.remote import Url, client_settings, explanation

if TYPE_CHECKING:
    import httpx
    from rich.console import Console
    from rich.text import Text

LOOKS = {
    "high": ("●", "green", "in the region"),
    "low": ("◐", "yellow", "not reliable enough"),
    "ood": ("○", "magenta", "out of distribution"),
    "unavailable": ("?", "bright_black", "could not be checked"),
}
"""Sign, colour and words of each region; the sign distinguishes regions without colour."""

HELP = """\
/alpha A       accuracy asked for            /exemplars N   show the N nearest labelled answers
/mode M        annotate, abstain or off      /new           forget the conversation
/help          this                          /quit          end (or Ctrl-D)
A line that ends with a backslash goes on in the next."""


# Control characters could move the cursor or set the clipboard, marks of direction show a text in another order.
_RANGES = ((0, 8), (11, 31), (127, 159), (0x61C, 0x61C), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069))
_CONTROL = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for first, last in _RANGES
    for code in range(first, last + 1)
}


def plain(text: str) -> str:
    """Returns a text from elsewhere such that a terminal only shows it: control characters are written out."""
    return text.translate(_CONTROL)


class Trouble(Exception):
    """The server returned an error or cannot be reached."""


@dataclass
class Reply:
    """text: the answer; None if it was withheld. result: its entry in `reliability.results`."""

    text: str | None
    refusal: str | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class Session:
    """The model, the earlier messages and the options of the next question."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def chat(
    url: Url = "http://127.0.0.1:8000",
    alpha: Annotated[float | None, typer.Option(help="Accuracy asked for.")] = None,
    mode: Annotated[
        str, typer.Option(help="annotate, abstain (withhold what is not reliable) or off.")
    ] = "annotate",
    exemplars: Annotated[int, typer.Option(min=0, help="Nearest labelled answers to show.")] = 0,
) -> None:
    """Talk to a running server, and see beside each answer whether to rely on it."""
    import httpx
    from rich.console import Console

    console = Console(highlight=False)
    options = {"mode": mode, "exemplars": exemplars} | ({} if alpha is None else {"alpha": alpha})
    with httpx.Client(**client_settings(url)) as client:
        try:
            session = Session(_served_model(client), [], options)
        except Trouble as trouble:
            typer.echo(f"Error: {plain(str(trouble))}", err=True)
            raise typer.Exit(1) from None
        console.print(plain(session.model), style="bold", markup=False, end="")
        console.print(f" at {url}   [bright_black]/help tells more[/]\n")
        for line in _questions():
            if line.strip() in ("/quit", "/exit"):
                return
            session = _turn(client, console, session, line)


def _turn(client: httpx.Client, console: Console, session: Session, line: str) -> Session:
    """Handles one line of input and returns the session after it."""
    if line.startswith("/"):
        return _command(console, session, line)
    asked = [*session.messages, {"role": "user", "content": line}]
    try:
        reply = stream(
            client, replace(session, messages=asked), lambda text: console.out(plain(text), end="")
        )
    except Trouble as trouble:
        console.print(plain(str(trouble)), style="red", markup=False, end="\n\n")
        return session
    except KeyboardInterrupt:
        console.print("\n[bright_black]stopped[/]\n")
        return session
    if reply.refusal is not None:
        console.print(plain(reply.refusal), style="italic", markup=False, end="")
    console.print()
    for text in verdict(reply.result):
        console.print(text)
    console.print()
    if reply.text is None:
        return session  # the answer was not shown, so it is not part of the conversation
    return replace(session, messages=[*asked, {"role": "assistant", "content": reply.text}])


def _command(console: Console, session: Session, line: str) -> Session:
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    try:
        match name:
            case "new":
                console.print("[bright_black]a new conversation[/]\n")
                return replace(session, messages=[])
            case "alpha":
                return replace(session, options=session.options | {"alpha": float(value)})
            case "exemplars":
                return replace(session, options=session.options | {"exemplars": int(value)})
            case "mode" if value in ("annotate", "abstain", "off"):
                return replace(session, options=session.options | {"mode": value})
    except ValueError:
        pass
    console.print(HELP, style="bright_black", end="\n\n")
    return session


def stream(client: httpx.Client, session: Session, show: Any) -> Reply:
    """Sends the request and shows the answer as it arrives. Raises Trouble."""
    import httpx

    body = {
        "model": session.model,
        "messages": session.messages,
        "stream": True,
        "reliability": session.options,
    }
    reply = Reply("")
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise Trouble(explanation(response))
            for event in _events(response):
                if "error" in event:
                    raise Trouble(event["error"]["message"])
                delta = event["choices"][0]["delta"] if event["choices"] else {}
                if delta.get("content"):
                    reply.text = (reply.text or "") + delta["content"]
                    show(delta["content"])
                if delta.get("refusal"):
                    reply.refusal = (reply.refusal or "") + delta["refusal"]
                if "reliability" in event:
                    reply.result = event["reliability"]["results"][0]
    except httpx.TransportError as error:
        raise Trouble(f"the server at {client.base_url} cannot be reached: {error}") from error
    if reply.refusal is not None:
        reply.text = None
    return reply


def verdict(result: dict[str, Any] | None) -> Iterator[Text]:
    """Yields the lines of a verdict; it yields none if the answer was not checked."""
    from rich.text import Text

    if result is None:
        return
    sign, colour, words = LOOKS[result["region"]]
    line = Text.assemble((f"{sign} {words}", f"bold {colour}"), (f" at {result['alpha']:g}", colour))
    if result["reason"]:
        line.append(f"  {result['reason'].replace('_', ' ')}", colour)
    yield line
    if result["probability"] is not None:
        yield Text(
            f"  probability {result['probability']:.4f}  q {result['similarity']}  "
            f"q' {result['rescaled_similarity']:.1f}  d {result['distance_quantile']:.3f}  "
            f"magnitude {result['magnitude']:.2f}",
            "bright_black",
        )
    for one in result["exemplars"]:
        label = "right" if one["label"] == 1 else "wrong"
        yield Text(
            f"  {one['distance']:8.2f}  {label}  {plain(one['response'])}",
            "bright_black",
            no_wrap=True,
            overflow="ellipsis",
        )


def _served_model(client: httpx.Client) -> str:
    import httpx

    try:
        response = client.get("/v1/models")
    except httpx.TransportError as error:
        raise Trouble(f"the server at {client.base_url} cannot be reached: {error}") from error
    if response.status_code != 200:
        raise Trouble(explanation(response))
    return str(response.json()["data"][0]["id"])


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _questions() -> Iterator[str]:
    """Yields questions until the input ends, with line editing and history if `readline` is there."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is imported
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input('  ')}"
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
