"""`candor.Model`: texts to states and verdicts, and from answers to a bundle that a server takes."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import candor
from candor.app.process.backend import Backend
from candor.app.process.selftest import SelfTest
from candor.engine.base import IdentityMismatch, PromptTooLong

ROOT = Path(__file__).resolve().parents[2]
MEAN_LAST = candor.Representation()


@pytest.fixture(scope="module")
def bundle() -> candor.Bundle:
    return candor.load_bundle(ROOT / "demo" / "bundle")


@pytest.fixture(scope="module")
def judging(demo_model: Path, bundle: candor.Bundle) -> Iterator[candor.Model]:
    with candor.Model(demo_model, bundle) as model:
        yield model


@pytest.fixture(scope="module")
def plain(demo_model: Path) -> Iterator[candor.Model]:
    """Without a bundle, of the papers' representation."""
    with candor.Model(demo_model, representation=MEAN_LAST, policy=candor.Policy(max_tokens=40)) as model:
        yield model


def test_an_answers_state_is_the_one_that_was_calibrated(
    judging: candor.Model, bundle: candor.Bundle
) -> None:
    rows = [0, 1, 2]
    states = judging.states(
        [bundle.exemplars[row].messages for row in rows], [bundle.exemplars[row].response for row in rows]
    )
    assert states.dtype == numpy.float32
    assert states.shape == (3, 1158)
    found = candor.judge(bundle, states, rule="sdm")._judgement.estimate
    known = bundle.estimator.support
    assert found.y_hat.tolist() == known.predictions[rows].tolist()
    typical = bundle.estimator.nearest(torch.from_numpy(states), 100)[0][
        :, -1
    ]  # to the hundredth nearest, squared
    assert (found.d_nearest < 0.1 * typical).all()


def test_one_answer_is_judged_as_its_state(judging: candor.Model, bundle: candor.Bundle) -> None:
    one = bundle.exemplars[0]
    states, prompts = judging.states([one.prompt], [one.response]), judging.prompt_states([one.prompt])
    assert prompts.shape == (1, 1152)
    verdict = judging.judge(one.prompt, one.response, alpha=0.98)
    assert verdict == candor.judge(bundle, states, prompt_states=prompts, alpha=0.98)[0]
    assert verdict.rule is not None
    assert verdict.rule.prompt_known
    by_region = judging.judge(one.prompt, one.response, rule="sdm", estimator="plain")
    assert by_region == candor.judge(bundle, states, rule="sdm", estimator="plain")[0]
    assert by_region.rule is None


@pytest.mark.parametrize(
    ("prompt", "response", "says"),
    [
        ("a", "b " * 70, "answers have at most 64"),
        ("a", "b <verified>", "it holds the tag <verified>"),
        ([{"role": role, "content": "a"} for role in ("user", "assistant", "user")], "b", "its turns"),
    ],
)
def test_what_the_policy_could_not_have_given_is_not_calibrated(
    judging: candor.Model, prompt: Any, response: str, says: str
) -> None:
    departure = judging.departure(prompt, response)
    assert departure is not None
    assert says in departure
    verdict = judging.judge(prompt, response)
    assert verdict.abstained
    assert not verdict.calibrated


def test_what_it_cannot_read(judging: candor.Model, plain: candor.Model) -> None:
    with pytest.raises(PromptTooLong, match="at most 2047 fit"):
        judging.states(["a", "a"], ["b", "b " * 3000])
    with pytest.raises(ValueError, match="last message must be by the user"):
        judging.states([[{"role": "assistant", "content": "a"}]], ["b"])
    for prompts, responses in ((["a", "b"], ["c"]), ("a", "b")):
        with pytest.raises(ValueError, match="a list of prompts and one of as many responses"):
            judging.states(prompts, responses)
    with pytest.raises(ValueError, match=r"open it with Model\(directory, bundle\)"):
        plain.judge("a", "b")


def test_another_models_bundle_is_refused_and_nothing_is_left_running(
    demo_model: Path, bundle: candor.Bundle
) -> None:
    before = set(threading.enumerate())
    model = replace(bundle.manifest.model, weights_sha256="0" * 64)
    with pytest.raises(IdentityMismatch, match="weights_sha256"):
        candor.Model(demo_model, replace(bundle, manifest=replace(bundle.manifest, model=model)))
    assert set(threading.enumerate()) <= before


def test_a_closed_model_says_so(demo_model: Path) -> None:
    with candor.Model(demo_model, representation=MEAN_LAST) as model:
        weights = weakref.ref(model._engine._model)  # type: ignore[attr-defined]
    gc.collect()
    assert weights() is None
    model.close()
    with pytest.raises(ValueError, match="this model was closed"):
        model.states(["a"], ["b"])


def answers(count: int) -> tuple[list[str], list[str], list[int]]:
    """Numbers and their successors, every other one wrong in a way that states show."""
    labels = [i % 2 for i in range(count)]
    responses = [f"{i + 1}" if label else "I would rather speak of the sea" for i, label in enumerate(labels)]
    return [f"What comes after {i}?" for i in range(count)], responses, labels


def test_from_answers_to_a_bundle_that_a_server_takes(
    plain: candor.Model, demo_model: Path, tmp_path: Path
) -> None:
    prompts, responses, labels = answers(60)
    states = plain.states(prompts, responses)
    calibrated = candor.calibrate(
        states,
        labels,
        alphas=0.6,
        model=plain,
        prompts=prompts,
        responses=responses,
        rounds=1,
        epochs=20,
        exemplar_dim=16,
        learning_rate=0.01,
    )
    saved = calibrated.save(tmp_path / "numbers")
    manifest = saved.manifest
    assert (manifest.name, manifest.model, manifest.policy) == ("numbers", plain.identity, plain.policy)
    assert (manifest.representation, manifest.alphas) == (MEAN_LAST, (0.6,))
    assert str(tmp_path) not in json.dumps(manifest.provenance)
    assert {one.prompt: one.response for one in saved.exemplars}.items() <= dict(
        zip(prompts, responses, strict=True)
    ).items()
    assert saved.report["held_out"]["lower"]["0.6"]["tokens"] > 0
    verdicts = candor.judge(saved, states)
    assert list(verdicts) == list(candor.judge(calibrated, states))
    assert not verdicts.abstained.all()
    # What a server checks before it serves: that this engine gives the states that were calibrated.
    plain._wait(SelfTest(Backend(plain._engine, plain.chat, saved)).check())
    with candor.Model(demo_model, saved) as model:
        assert model.judge(prompts[1], responses[1]) == verdicts[1]
    with pytest.raises(candor.CalibrationError, match="exists already"):
        calibrated.save(tmp_path / "numbers")


def test_answers_that_the_model_does_not_give_are_refused_by_row(plain: candor.Model) -> None:
    prompts, responses, labels = answers(40)
    states = numpy.zeros((40, 1152), dtype="float32")
    given: dict[str, Any] = {"model": plain, "prompts": prompts, "responses": responses}
    long = [*responses[:-1], "a " * 50]
    with pytest.raises(
        candor.CalibrationError, match=r"row 39: it has \d+ tokens, and answers have at most 40"
    ):
        candor.calibrate(states, labels, **{**given, "responses": long})
    with pytest.raises(ValueError, match="states of this model are 1152 wide; got 1151"):
        candor.calibrate(states[:, 1:], labels, **given)
    with pytest.raises(ValueError, match="with model, give prompts and responses"):
        candor.calibrate(states, labels, model=plain)
