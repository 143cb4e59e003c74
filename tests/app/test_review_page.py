"""The console's review page in Chromium: answers are labelled with the keyboard, and the server has the labels."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
expect = sync_api.expect

pytestmark = pytest.mark.browser


@pytest.fixture
def open_review() -> Iterator[Callable[..., Any]]:
    """Opens a server's review page; whatever the browser complains of fails."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)

        def open_(url: str) -> Any:
            page = browser.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
            page.goto(f"{url}/console/review.html")
            return page

        yield open_
        browser.close()
    assert complaints == []


def test_labelling_with_the_keyboard(
    serve: Any, gates: Any, tmp_path: Path, open_review: Any, wait_until: Any
) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1, keep_texts="all") as server:
        server.engine.script("thin", state="thin")
        ids = [server.chat(f"question {number}").json()["id"] for number in range(4)]
        withheld = server.chat("thin").json()["id"]
        page = open_review(server.url)
        expect(page.locator("#conversation")).to_contain_text("question 0")
        expect(page.locator("#text")).to_have_text("The answer.")
        expect(page.locator("#waiting-sampled")).to_have_text("4")
        page.keyboard.press("r")
        expect(page.locator("#conversation")).to_contain_text("question 1")
        page.keyboard.press("s")  # later
        expect(page.locator("#conversation")).to_contain_text("question 2")
        page.keyboard.press("u")
        expect(page.locator("#conversation")).to_contain_text("question 3")
        page.locator("#instead").fill("A right answer")  # letters typed there are no labels
        page.keyboard.press("Tab")
        page.keyboard.press("w")
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#waiting-sampled")).to_have_text("1")

        page.get_by_label("withheld").check()
        expect(page.locator("#conversation")).to_contain_text("thin")
        page.get_by_role("button", name="Wrong").click()
        expect(page.locator("#empty")).to_be_visible()

        page.reload()  # what was put off comes again
        expect(page.locator("#conversation")).to_contain_text("question 1")
        page.keyboard.press("r")
        expect(page.locator("#empty")).to_be_visible()
        ticket = server.client.get(f"/v1/reliability/answers/{ids[3]}").json()
        assert ticket["results"][0]["answer"] == "A right answer"
        if folder := os.environ.get("SCREENSHOTS"):
            server.chat("question 4")
            page.reload()
            expect(page.locator("#conversation")).to_contain_text("question 4")
            page.screenshot(path=Path(folder) / "console-review.png", full_page=True)
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="axe is not installed (extra dev)"
        )
        found = axe.Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
    with closing(sqlite3.connect(tmp_path / "s")) as file:
        labels = dict(file.execute("SELECT id, correct FROM labels").fetchall())
    assert labels == {ids[0]: 1, ids[1]: 1, ids[2]: None, ids[3]: 0, withheld: 0}


def test_the_console_says_how_the_certificate_stands(
    serve: Any, gates: Any, tmp_path: Path, open_review: Any
) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1) as server:
        for _ in range(6):
            id = server.chat("ask").json()["id"]
            server.client.post("/v1/reliability/labels", json={"id": id, "correct": False})
        page = open_review(server.url)
        page.wait_for_timeout(6000)  # the labels are read within 5 s
        page.goto(f"{server.url}/console/")
        expect(page.locator("#certificates .suspended")).to_contain_text("suspended: audits speak against it")
        expect(page.locator("#certificates")).to_contain_text("of 6 audits 0 were right")
