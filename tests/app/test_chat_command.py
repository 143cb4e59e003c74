"""`candor chat`: what a reader sees of each answer, and what goes into the next question."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.clients.chat import plain


def talk(url: str, *lines: str, options: tuple[str, ...] = ()) -> str:
    """What is shown when these lines are typed."""
    typed = "".join(f"{line}\n" for line in lines)
    done = CliRunner().invoke(cli, ["chat", "--url", url, *options], input=typed)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_region_stands_beneath_each_answer(server: Any) -> None:
    server.engine.script("far", state="far")
    server.engine.script("edge", state="edge")
    shown = talk(server.url, "ask", "/new", "far", "/new", "edge")
    assert shown.startswith("tiny at http://")
    assert shown.count("The answer.") == 3
    high, ood, low = (line for line in shown.splitlines() if line[:1] in ("●", "○", "◐"))
    assert high == "● in the region at 0.9"
    assert ood == "○ out of distribution at 0.9  out of distribution"
    assert low == "◐ not reliable enough at 0.9  below similarity threshold"
    assert "probability 1.0000  q " in shown


def test_a_conversation_goes_on_until_a_new_one(server: Any) -> None:
    talk(server.url, "first", "second", "/new", "third", "/quit", "never")
    asked = [text for text, _, _ in server.engine.asked]
    assert len(asked) == 3
    assert "user:first" in asked[1]
    assert "assistant:The answer." in asked[1]
    assert "first" not in asked[2]


def test_a_withheld_answer_is_shown_as_such_and_forgotten(server: Any) -> None:
    server.engine.script("far", state="far")
    shown = talk(server.url, "far", "ask", options=("--mode", "abstain"))
    assert "I do not know this reliably enough to answer." in shown
    assert shown.count("The answer.") == 1
    assert "far" not in server.engine.asked[1][0]


def test_commands_change_what_is_asked_for(server: Any) -> None:
    shown = talk(server.url, "/alpha 0.95", "/exemplars 2", "ask", "/mode off", "ask", "/alpha x", "/nothing")
    assert "in the region at 0.95" in shown
    assert shown.count("response ") == 2  # of the exemplars
    assert shown.count("●") == 1
    assert shown.count("/help          this") == 2


def test_a_line_goes_on_after_a_backslash(server: Any) -> None:
    talk(server.url, "one\\", "two")
    assert "user:one\ntwo" in server.engine.asked[0][0]


def test_an_objection_is_told_and_the_conversation_goes_on(server: Any) -> None:
    shown = talk(server.url, "/alpha 0.5", "ask", "/alpha 0.9", "ask")
    assert "expected an alpha the bundle was calibrated at" in shown
    assert "in the region at 0.9" in shown


def test_no_server_is_one_line() -> None:
    done = CliRunner().invoke(cli, ["chat", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the server at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


def test_what_others_wrote_is_only_shown(server: Any) -> None:
    """Escape sequences, markup and marks of direction: of the answer, of a refusal and of an exemplar alike."""
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x08\r\u202eabc[red]x[/red]"
    server.engine.script("ask", pieces=(evil[:5], evil[5:]))
    shown = talk(server.url, "ask")
    assert r"\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x08\x0d\u202eabc[red]x[/red]" in shown
    assert not set(shown) & set("\x1b\x07\x08\x9b\r\u202e")
    assert plain("fine\n\tÄ 漢 🙂") == "fine\n\tÄ 漢 🙂"


def test_a_refusal_and_an_error_are_only_shown(serve: Any) -> None:
    with serve(refusal_text="[bold]no\x1b[2J", served_model_name="a[red]b\x1b[0m") as server:
        server.engine.script("far", state="far")
        shown = talk(server.url, "far", "/alpha 0.5", "far", options=("--mode", "abstain"))
    assert r"[bold]no\x1b[2J" in shown
    assert r"a[red]b\x1b[0m at http" in shown
    assert "\x1b" not in shown
