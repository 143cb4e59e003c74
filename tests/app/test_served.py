"""What a server tells of the bundle it judges by, and the console's files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from candor.app.edge.routes import served
from candor.app.edge.routes.console import CONSOLE
from candor.policy.certificate import Certificate
from candor.sdm.estimator import SDMEstimator

DIGEST = "0123456789abcdef" * 4


def test_the_bundle(server: Any, estimator: SDMEstimator) -> None:
    body = server.client.get("/v1/reliability").json()
    assert (body["name"], body["bundle"], body["model"]) == ("tiny", DIGEST, "tiny")
    assert (body["estimator"], body["default_alpha"], body["most_exemplars"]) == ("lower", 0.9, 10)
    assert body["policy"]["conversations"]["system_prompt"]["text"] == "Be brief."
    assert body["report"] == {"reference_abstention_ratio": {"0.9": 0.25, "0.95": 0.5}}
    assert body["takes_feedback"] is False
    for shown in body["regions"]:
        region = estimator.regions[shown["alpha"]]
        assert shown["found"] is region.found is True
        assert shown["rescaled_similarity_threshold"] == region.q_prime_min
        assert shown["class_thresholds"] == pytest.approx(region.psi.tolist())


def test_a_region_that_was_not_found_has_no_numbers(server: Any, estimator: SDMEstimator) -> None:
    nowhere = estimator.with_regions([0.9999])
    assert not nowhere.regions[0.9999].found
    [shown] = served._regions(_Bundle(nowhere))  # type: ignore[arg-type]
    assert (shown.found, shown.rescaled_similarity_threshold, shown.class_thresholds) == (False, None, None)


class _Bundle:
    def __init__(self, estimator: SDMEstimator) -> None:
        self.estimator = estimator


def test_examples_are_prompts_known_to_be_answered_rightly_unless_texts_are_private(
    server: Any, serve: Any, bundle: Any
) -> None:
    examples = server.client.get("/v1/reliability").json()["examples"]
    known = {one.prompt: one for one in bundle.exemplars}
    assert len(examples) == 3
    assert all(known[text].label == known[text].prediction == 1 for text in examples)
    with serve(max_exemplars=0) as private:
        assert private.client.get("/v1/reliability").json()["examples"] == []


def test_certificates(serve: Any) -> None:
    one = Certificate(0.9, "lower", 0.95, 0.95, 300.0, 400, 120, 119, 0.961)
    with serve(certificates=[one]) as server:
        assert server.client.get("/v1/reliability").json()["certificates"] == [
            {
                "rule": "sdm",
                "score_min": None,
                "forecast_min": None,
                "base_right": None,
                "standing": None,
                **asdict(one),
            }
        ]


def test_digests_of_prompts_are_not_sent(serve: Any) -> None:
    with serve(report={"fitted_prompts": ["a" * 64], "counts": {}}) as server:
        assert server.client.get("/v1/reliability").json()["report"] == {"counts": {}}


def test_the_calibration_points(server: Any, estimator: SDMEstimator) -> None:
    points = server.client.get("/v1/reliability/calibration").json()
    seen = estimator.calibration
    assert points["total"] == len(points["label"]) == len(seen.labels) == 800
    assert points["label"] == seen.labels.tolist()
    assert points["rescaled_similarity"] == pytest.approx(seen.q_prime.tolist(), abs=1e-3)
    rows = torch.arange(800)
    own = seen.sdm[rows, torch.tensor(points["prediction"])]
    assert torch.equal(own, seen.sdm.max(dim=1).values)
    assert points["probability"] == pytest.approx(own.tolist(), abs=1e-7)


def test_of_many_points_some_are_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LARGEST_PLOT", 300)
    points = server.client.get("/v1/reliability/calibration").json()
    assert points["total"] == 800
    assert {len(points[name]) for name in ("label", "prediction", "probability", "rescaled_similarity")} == {
        267
    }


def files() -> list[str]:
    return [str(path.relative_to(CONSOLE)) for path in CONSOLE.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["", *files()])
def test_the_consoles_files_are_served_with_a_strict_policy(server: Any, name: str) -> None:
    response = server.client.get(f"/console/{name}")
    assert response.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_host_and_no_script_of_its_own() -> None:
    page = (CONSOLE / "index.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "style=" not in page
    assert page.count("<script") == page.count("<script src=") == 2
    for script in CONSOLE.glob("*.js"):
        assert "innerHTML" not in script.read_text(encoding="utf-8"), script  # texts of strangers are shown


def test_what_is_not_there_is_an_error_like_any_other(server: Any) -> None:
    for path in ("/console/nothing.js", "/console/../app/main.py", "/console/%2e%2e/main.py"):
        response = server.client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.client.get("/console", follow_redirects=True).status_code == 200


def test_the_bundled_library_has_its_licence() -> None:
    vendor = CONSOLE / "vendor"
    assert (vendor / "chart.umd.min.js").read_text(encoding="utf-8").startswith("/*!\n * Chart.js v4.6.1")
    assert "MIT" in (vendor / "chart.LICENSE.md").read_text(encoding="utf-8")
