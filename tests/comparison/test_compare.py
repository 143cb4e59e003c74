"""From a bundle and its files to the report: figures that agree with each other, a page that needs nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from candor.calibration.answering import AnsweringOptions, DataFile, Inputs, answer_inputs
from candor.calibration.errors import DataError
from candor.calibration.fit import FitSettings
from candor.calibration.generate import Labelled
from candor.calibration.run import make_bundle
from candor.comparison import figures
from candor.comparison.comparators import COMPARATORS
from candor.comparison.compare import Comparison, SetComparison, halves
from candor.comparison.page import mistakes, page
from candor.comparison.run import CompareSettings, gather, run_comparison, write
from candor.comparison.tables import as_markdown, as_text, tables
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle, load_bundle
from candor.policy.policy import Policy

POLICY = Policy(temperature=0.0, top_p=1.0, top_k=0, max_tokens=16)
FIT = FitSettings(alphas=(0.8, 0.9), rounds=1, epochs=10, exemplar_dim=8, learning_rate=1e-2)
METHODS = ("softmax", "mahalanobis", "sdm_hr", "semantic_entropy")


class Made:
    """One bundle of the scripted task and its comparison, made once for the file."""

    bundle: Bundle
    comparison: Comparison
    fitted: list[Labelled]
    folder: Path
    files: list[Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, scripted: Any) -> Made:
    folder = tmp_path_factory.mktemp("compare")
    data = scripted.write_task(folder / "d.jsonl", range(240))
    held_out = scripted.write_task(folder / "t.jsonl", range(1000, 1080))
    far = scripted.write_task(folder / "far.jsonl", range(2000, 2012))
    chat: ChatFormat = scripted.scripted_chat()
    engine = scripted.ScriptedEngine()
    engine.overrides = {2003: {"truncated": True}}
    inputs, asking = Inputs.load(data, [held_out]), AnsweringOptions(folder / "cache", concurrency=8)
    answers = asyncio.run(answer_inputs(engine, chat, inputs, POLICY, asking))
    make_bundle(inputs, answers, FIT, folder / "bundle", "scripted")
    found = Made()
    found.folder, found.bundle, found.fitted = folder, load_bundle(folder / "bundle"), answers.fitting
    settings = CompareSettings(METHODS, ensemble=2, asked=30)
    sets = {"test": DataFile.load(held_out), "ood": DataFile.load(far)}
    material = asyncio.run(gather(engine, chat, found.bundle, DataFile.load(data), sets, settings, asking))
    found.comparison = run_comparison(material, settings)
    found.files = write(found.bundle, found.comparison, folder / "report")
    return found


@pytest.fixture(scope="module")
def text(made: Made) -> str:
    """The page."""
    return made.files[2].read_text(encoding="utf-8")


def with_mistakes(made: Made) -> SetComparison:
    """The held-out set, had ten of its answers another label: the scripted task itself leaves no mistakes."""
    one = made.comparison.sets["test"]
    y = one.y.clone()
    y[:10] = 1 - y[:10]
    answers = [
        replace(answer, messages=({"role": "user", "content": "<script>"},), label=1 if label else 0)
        for answer, label in zip(one.answers, y.tolist(), strict=True)
    ]
    return replace(one, y=y, answers=answers)


def test_the_halves_are_those_that_the_layer_was_made_from(made: Made) -> None:
    fitting = halves(made.bundle, made.fitted, 0, 2)
    assert [one.id for one in fitting.training] == [one.id for one in made.bundle.exemplars]
    estimator = made.bundle.estimator
    h_prime = estimator.measure(fitting.train_rows.h).h_prime
    assert h_prime.equal(estimator.support.h_prime)
    _, sdm, _ = estimator.activate(fitting.calibration_rows.measurement)
    assert sdm.equal(estimator.calibration.sdm)
    assert fitting.layer.exemplar_dim == 8
    assert fitting.layer.epochs == 10


def test_other_answers_than_the_bundles_are_refused(made: Made) -> None:
    turned = [replace(one, label=1 - one.label) for one in made.fitted]
    for wrong in (made.fitted[:-10], turned, []):
        with pytest.raises(DataError, match="give --calibration the file that the bundle was made from"):
            halves(made.bundle, wrong, 0, 2)


def test_what_was_asked_for_is_compared_and_what_is_served_always(made: Made) -> None:
    assert list(made.comparison.sets["test"].scores) == ["softmax", "mahalanobis", "sdm_hr", "sdm_hr_lower"]
    for one in made.comparison.sets.values():
        difference = one.scores["sdm_hr_lower"].difference
        assert {figure.value for figure in difference.values()} == {0.0}
        assert {figure.low for figure in difference.values()} == {0.0}


def test_figures_of_what_is_served_agree_with_the_bundles_report(made: Made) -> None:
    reading = made.bundle.report["held_out"]["lower"]["0.8"]
    found = made.comparison.sets["test"].scores["sdm_hr_lower"].admitted[0.8]
    for ours, theirs in (
        ("admitted", "admitted"),
        ("answered", "answered"),
        ("marginal", "accuracy_admitted"),
    ):
        assert (found[ours].hits, found[ours].of) == (reading[theirs]["hits"], reading[theirs]["of"])
        assert found[ours].exact == pytest.approx((reading[theirs]["low"], reading[theirs]["high"]))
    assert found["answered"].hits is not None
    assert found["answered"].hits > 0


def test_answers_without_a_score_are_told_and_left_out(made: Made, text: str) -> None:
    one = made.comparison.sets["ood"]
    assert (one.records, len(one.y), one.faults) == (12, 11, {"truncated": 1})
    assert "left out, and admitted by none: 1 truncated" in text


def test_methods_that_ask_again_stand_beside_all_others_on_the_same_prompts(made: Made) -> None:
    part, whole = made.comparison.sampled["test"], made.comparison.sets["test"]
    assert list(part.scores) == [*whole.scores, "semantic_entropy"]
    assert len(part.y) == 30
    places = {answer.id: row for row, answer in enumerate(whole.answers)}
    for row, answer in enumerate(part.answers):
        at = places[answer.id]
        assert part.verdicts["softmax"].confidence[row] == whole.verdicts["softmax"].confidence[at]
        assert part.y[row] == whole.y[at]
    # Scripted answers never differ: ten replies of one meaning, so the score tells nothing.
    assert part.verdicts["semantic_entropy"].confidence.unique().numel() == 1
    assert part.cost["semantic_entropy"]["read"] == pytest.approx(10 * len("<user>number 1000<assistant>"))
    assert len(made.comparison.sampled["ood"].y) == 11


def test_json_has_every_figure_and_nothing_that_json_has_not(made: Made) -> None:
    fields = json.loads(json.dumps(made.comparison.to_json(), allow_nan=False))
    softmax = fields["sets"]["test"]["methods"]["softmax"]
    assert set(softmax["admitted"]) == {"0.8", "0.9"}
    assert {"aurc", "e_aurc", "augrc", "prr", "roc_auc", "coverage_at_risk"} <= set(softmax["answers"])
    assert {"top_label_ece", "brier"} <= set(softmax["verdicts"])
    assert "brier" not in fields["sets"]["test"]["methods"]["mahalanobis"]["verdicts"]
    share = softmax["admitted"]["0.8"]["admitted"]
    assert share["value"] == share["hits"] / share["of"]
    assert share["low"] <= share["value"] <= share["high"]


def test_tables_say_the_figures(made: Made) -> None:
    one = made.comparison.sets["test"]
    several = list(tables(made.comparison, "test", one))
    assert [table.title for table in several] == [
        "test: admitted at alpha = 0.8",
        "test: admitted at alpha = 0.9",
        "test: ranking answers",
        "test: ranking verdicts",
    ]
    aurc = {name: scores.answers["aurc"].value for name, scores in one.scores.items()}
    column = several[2].header.index("AURC")
    for (_, cells), value in zip(several[2].rows, aurc.values(), strict=True):
        assert value is not None
        assert cells[column].value == f"{value:.3f}"
        assert cells[column].best == (value == min(v for v in aurc.values() if v is not None))
    text, markdown = as_text(several[2]), as_markdown(several[2])
    assert len(text.splitlines()) == 2 + len(aurc)
    assert all(line.count("|") == len(several[2].header) + 2 for line in markdown.splitlines()[4:])


class Reader(HTMLParser):
    """Collects what a browser would fetch, and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "img":
            self.pictures.append(found)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.fetched += [found[name] or "" for name in ("src", "href") if name in found]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_its_figures_no_colour(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(url.startswith(("#", "data:image/svg+xml;base64,")) for url in reader.fetched)
    assert "<script" not in text
    assert "@import" not in text
    assert len(reader.pictures) == 2 + 2 * 2
    for picture in reader.pictures:
        assert picture["alt"]
        svg = base64.b64decode((picture["src"] or "").partition("base64,")[2])
        ElementTree.fromstring(svg)
        colours = set(re.findall(rb"#([0-9a-f]{6})\b", svg))
        assert colours
        assert all(colour[:2] == colour[2:4] == colour[4:] for colour in colours)


def test_texts_are_shown_as_texts(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_svg", lambda _: b"")  # drawn already, and slow
    sets = {"test": with_mistakes(made)}
    text = page(made.bundle, replace(made.comparison, sets=sets, sampled={}))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_the_most_confident_mistakes_come_first_with_their_exemplars(made: Made) -> None:
    one = with_mistakes(made)
    found = mistakes(made.bundle, one, 0.8)
    assert len(found) == 8
    assert all(mistake.verdict != mistake.label for mistake in found)
    assert [mistake.sdm for mistake in found] == sorted((m.sdm for m in found), reverse=True)
    for mistake in found:
        assert len(mistake.neighbours) == 3
        far = [near.distance for near in mistake.neighbours]
        assert far == sorted(far)


def test_the_report_is_three_files(made: Made) -> None:
    assert [path.name for path in made.files] == ["comparison.json", "comparison.md", "comparison.html"]
    assert json.loads(made.files[0].read_text())["digest"] == made.bundle.digest
    for name in made.comparison.sets:
        assert f"### {name}: ranking answers" in made.files[1].read_text()


def test_a_figure_gives_the_same_bytes_each_time(made: Made) -> None:
    sets = made.comparison.sets
    first, second = (figures.distances(made.bundle.estimator, sets) for _ in range(2))
    assert first == second


def test_settings_name_known_methods() -> None:
    with pytest.raises(ValueError, match=r"unknown methods \['mood'\]"):
        CompareSettings(("softmax", "mood"))
    with pytest.raises(ValueError, match="give all, or some of no_reject"):
        CompareSettings(())
    assert CompareSettings(tuple(COMPARATORS)).comparators == list(COMPARATORS)
    assert CompareSettings(("verbalised",), asked=0).samplers == []
