"""The report for people: its three figures are the held-out ones, and what it shows of prompts is text."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.answering import AnsweringOptions, Inputs, answer_inputs
from candor.calibration.data import load_records
from candor.calibration.report_page import MISTAKES, page
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import Certifying, Made, make_bundle
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle, load_bundle
from tests.calibration.test_run import POLICY, SETTINGS


def made(
    engine: Any, chat: ChatFormat, data: Path, test: Path, folder: Path, rule: RuleSettings | None
) -> tuple[Bundle, Made]:
    inputs = Inputs.load(data, [test])
    answers = asyncio.run(
        answer_inputs(engine, chat, inputs, POLICY, AnsweringOptions(folder / "cache", concurrency=8))
    )
    certifying = Certifying(None if rule else 0.6, 0.1, 0.4)
    settings = SETTINGS if rule else replace(SETTINGS, epochs=60)
    result = make_bundle(inputs, answers, settings, folder / "bundle", "scripted", certifying, rule)
    return load_bundle(folder / "bundle"), result


class Texts(HTMLParser):
    """What a reader sees, and the elements on the way."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.tags: set[str] = set()
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.seen.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.seen))


@pytest.mark.parametrize("rule", [RuleSettings(), None])
def test_the_first_screen_says_what_the_held_out_figures_say(
    rule: RuleSettings | None,
    make_engine: Callable[..., Any],
    chat: ChatFormat,
    task: Callable[[Path, Sequence[int]], Path],
    tmp_path: Path,
) -> None:
    test = task(tmp_path / "t.jsonl", range(900, 1000))
    bundle, result = made(make_engine(), chat, task(tmp_path / "d.jsonl", range(500)), test, tmp_path, rule)
    records = {one.prompt_digest: one for one in load_records(test)}
    document = page(bundle, result.outcome.held_out, records, {"strangers": result.outcome.held_out[:7]})
    seen = Texts(document)
    assert not seen.tags & {"script", "img", "link", "iframe"}
    alpha = 0.9 if rule else bundle.certificates[-1].alpha
    evaluation = result.outcome.evaluation
    reading = evaluation.rule[alpha] if rule else evaluation.lower[alpha]
    answered, right = reading.answered, reading.accuracy_answered
    assert f"Of 100 questions kept apart, {answered.hits} were answered" in seen.text
    assert f"{right.hits} of the {right.of} answers were right" in seen.text
    assert f"answered {answered.value:.1%}" in seen.text
    assert f"right, of these {right.value:.1%}" in seen.text
    assert answered.hits > 0
    promised = bundle.rule.terms.at(alpha) if bundle.rule else bundle.certificates[-1]
    assert promised is not None
    assert f"promised {100 * promised.accuracy:g}%" in seen.text
    assert re.search(r"strangers 7 ", seen.text)
    # The surest mistakes are wrong answers, each beside calibrated ones.
    wrong = {one.response for one in result.outcome.held_out if not one.label}
    shown = re.findall(r"<dt>answer</dt><dd>(.*?)</dd>", document)
    assert 0 < len(shown) <= MISTAKES
    assert set(map(html.unescape, shown)) <= wrong
    assert document.count("<dt>like (") == 2 * len(shown)


def test_prompts_are_shown_as_text_and_by_kind(
    make_engine: Callable[..., Any],
    chat: ChatFormat,
    task: Callable[[Path, Sequence[int]], Path],
    tmp_path: Path,
) -> None:
    test = task(tmp_path / "t.jsonl", range(900, 960))
    rows = [
        json.loads(line) | {"area": f"<b>{i % 2}</b>"}
        for i, line in enumerate(test.read_text().split("\n")[:60])
    ]
    test.write_text("\n".join(map(json.dumps, rows)))
    bundle, result = made(
        make_engine(), chat, task(tmp_path / "d.jsonl", range(300)), test, tmp_path, RuleSettings()
    )
    records = {one.prompt_digest: one for one in load_records(test)}
    forged = [replace(one, response="<script>alert(1)</script>", label=0) for one in result.outcome.held_out]
    document = page(bundle, forged, records, kind="area")
    assert "<script" not in document
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in document
    seen = Texts(document).text
    assert "What is let through, by area" in seen
    assert "<b>0</b> 30 " in seen
    assert "<b>1</b> 30 " in seen
