"""The console in Chromium, asking the real server: what a reader sees, with mouse, keyboard and phone.

With SCREENSHOTS=DIR the pictures of docs/images are written there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)").expect

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((ROOT / "demo/bundle/report.json").read_text())
HELD_OUT = REPORT["held_out"]["rule"]["0.9"]

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}


def ask(page: Any, example: str, *, withhold: bool = False) -> None:
    page.get_by_role("button", name=example, exact=True).click()
    page.get_by_label("withhold it" if withhold else "show it, marked").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    answered(page)


def answered(page: Any) -> None:
    page.wait_for_selector("#answer[aria-busy=false] h2", timeout=120_000)  # the machine may be busy


def picture(page: Any, name: str, **how: Any) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(300)  # for what scrolls or fades
        page.screenshot(path=Path(folder) / f"{name}.png", **how)


def between(page: Any, first: str, last: str) -> dict[str, Any]:
    """For `picture`: the page from the top of one section to the end of another."""
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
    top, bottom = (page.locator(one).bounding_box() for one in (first, last))
    y = max(0, top["y"] - 24)
    height = bottom["y"] + bottom["height"] + 30 - y
    return {"full_page": True, "clip": {"x": 0, "y": y, "width": 1360, "height": height}}


def faults(page: Any) -> list[str]:
    """What axe-core calls serious or critical."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed (extra dev)"
    )
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']][:3]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_an_unlike_question_is_withheld(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    ask(page, "something unlike", withhold=True)
    assert page.locator("#headline").inner_text() == "Unlike what was calibrated"
    assert page.locator("#text").inner_text().startswith("Withheld. The client reads: “I do not know this")
    assert "ood" in page.locator("#answer").get_attribute("class")
    assert page.locator(
        "#feedback"
    ).is_hidden()  # nobody can say whether an answer they did not see was right
    picture(page, "console-withheld")


def test_a_stricter_accuracy(open_page: Open) -> None:
    """The papers' region is not there at 98 %; the certified score is."""
    page = open_page()
    page.get_by_label("Accuracy asked for").select_option("0.98")
    ask(page, "example 1")
    assert (
        "98% are right" in page.locator("#reason").inner_text()
        or "is below" in page.locator("#reason").inner_text()
    )
    assert "no region at 98 %" in page.locator("#plane-legend").inner_text()


def test_a_reliable_answer(open_page: Open) -> None:
    page = open_page()
    ask(page, "example 1")
    assert page.locator("#headline").inner_text() == "Reliable"
    assert "Of such answers at least 95% are right" in page.locator("#reason").inner_text()
    assert page.locator("#text").inner_text().startswith("<sentence>")
    shown = dict(
        zip(
            page.locator("#measures dt").all_inner_texts(),
            page.locator("#measures .value").all_inner_texts(),
            strict=True,
        )
    )
    assert list(shown) == [
        "Prompt p",
        "Score S",
        "Right with",
        "Similarity q",
        "Distance quantile d",
        "Magnitude",
        "Probability SDM(z\N{PRIME})",
        "Rescaled similarity q\N{PRIME}",
        "Sample size",
    ]
    assert float(shown["Score S"]) > 1.24  # the threshold
    assert "this answer at q\N{PRIME}" in page.locator("#plane").get_attribute("aria-label")
    assert page.locator("#exemplar-list li").count() == 3
    assert page.locator("#exemplar-list .tag").first.inner_text() == "follows the instruction"
    picture(page, "console", **between(page, "#ask", "#exemplars"))


def test_the_live_rate_counts_what_was_asked(open_page: Open) -> None:
    page = open_page()

    def counts() -> tuple[int, int]:
        cells = page.locator("tr.region td:nth-child(2)").all_inner_texts()
        return sum(map(int, cells)), int(cells[2])

    answers, unlike = counts()
    ask(page, "something unlike")
    expect(page.locator("tr.region td:nth-child(2)").nth(2)).to_have_text(str(unlike + 1))
    assert counts() == (answers + 1, unlike + 1)
    withheld = 100 * (1 - HELD_OUT["answered"]["value"])
    assert f"Calibration measured {withheld:.1f} %" in page.locator("#rate-reference").inner_text()
    picture(page, "console-live", **between(page, "#live", "#bundle"))


def test_the_bundles_report(open_page: Open) -> None:
    page = open_page()
    rows = page.locator("#held-out tbody tr").all_inner_texts()
    assert [re.split(r"\s+", row)[0] for row in rows] == ["90", "95", "98"]
    for measured in ("answered", "accuracy_answered"):
        assert f"{100 * HELD_OUT[measured]['value']:.1f} %" in rows[0]
    assert not any("no certificate" in row for row in rows)
    assert page.locator("#certificates li").count() == 3
    assert "word-ordering" in page.locator("#facts").inner_text()


def test_feedback(open_page: Open) -> None:
    page = open_page()
    ask(page, "example 2")
    page.get_by_role("button", name="It was right").click()
    expect(page.locator("#feedback-words")).to_contain_text("Thank you")


def test_without_a_key_it_asks_for_one(open_page: Open, server: Any) -> None:
    page = open_page(key=None)
    field = page.get_by_label("Sent with every request of this page")
    field.fill("candor-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#trouble")).to_contain_text("expected a key")
    assert page.locator("#served").inner_text() == "not connected"
    field.fill(server.key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer-counts tr")
    assert page.locator("#trouble").is_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the question"
    page.keyboard.press("Enter")
    page.keyboard.type("Finish the sentence with the words in the right order.\nSentence: I am\nWords: here.")
    page.keyboard.press("Control+Enter")
    answered(page)
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText || document.activeElement.value"))
    assert {"example 1", "something unlike", "Ask", "annotate"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    assert faults(page) == []
    ask(page, "example 1")
    assert faults(page) == []
    page.get_by_role("button", name="API key").click()
    assert faults(page) == []


def test_on_a_phone(open_page: Open) -> None:
    page = open_page(**PHONE)
    ask(page, "example 3")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert faults(page) == []
    page.evaluate("document.getElementById('answer').scrollIntoView()")
    picture(page, "console-phone")


def test_nothing_comes_from_elsewhere(open_page: Open, server: Any) -> None:
    page = open_page()
    hosts = []
    page.on("request", lambda request: hosts.append(urlsplit(request.url).netloc))
    page.reload()
    page.wait_for_selector("#answer-counts tr")
    assert len(hosts) > 8
    assert set(hosts) == {urlsplit(server.url).netloc}
    policy = page.request.get(f"{server.url}/console/").headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_api_documents_itself_and_can_be_tried(open_page: Open, server: Any) -> None:
    page = open_page()
    page.goto(f"{server.url}/docs")
    route = page.locator("details", has=page.get_by_text("GET /v1/models", exact=True))
    route.locator("summary").click()
    route.get_by_role("button", name="Send").click()
    expect(route.locator("form pre")).to_contain_text('"object":"list"')
    assert faults(page) == []
