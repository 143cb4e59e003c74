"""`candor.judge` says of states what the server and calibration say of them, in every column, by either rule."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import candor
from candor.app.answering.scoring import Scorer, ScoringFailed, ScoringRequest
from candor.calibration.generate import Labelled
from candor.calibration.served import Attempts
from candor.engine.base import HiddenSummary, PromptStates
from candor.policy.decision import Verdict

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("lower", "plain")


@pytest.fixture(scope="module")
def bundle() -> candor.Bundle:
    return candor.load_bundle(ROOT / "demo" / "bundle")


@pytest.fixture(scope="module")
def states(bundle: candor.Bundle) -> numpy.ndarray:
    """(150, D): states that lead to the support's h' but for some noise, states of no such kind, and broken ones."""
    adaptor = bundle.estimator.adaptor
    weight, bias = adaptor.exemplar.weight.detach(), adaptor.exemplar.bias.detach()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(bundle.estimator.support), generator=generator)[:100]
    with torch.no_grad():
        x = torch.linalg.lstsq(weight, (bundle.estimator.support.h_prime[rows] - bias).T).solution.T
    known = adaptor.mean + adaptor.scale * (x + 0.02 * torch.randn(x.shape, generator=generator))
    unknown = torch.randn(48, adaptor.input_dim, generator=generator)
    broken = unknown[:2].clone()
    broken[0, 3], broken[1, 5] = torch.nan, -torch.inf
    return torch.cat([known, unknown, broken]).numpy()


def served(
    bundle: candor.Bundle, states: numpy.ndarray, alpha: float, kind: Any, **how: Any
) -> list[Verdict | str]:
    """What the server makes of each: its verdict, or the cause for which there is none."""
    sizes = bundle.manifest.representation.block_sizes(bundle.manifest.model.hidden_size)

    async def judge() -> list[Any]:
        scorer = Scorer(bundle, kind, timeout_s=60)
        summaries = [
            HiddenSummary(*torch.from_numpy(row).split(sizes), positions=1, complete=True) for row in states
        ]
        asked = [ScoringRequest(one, alpha, **{"calibrated": True, **how}) for one in summaries]
        try:
            return await asyncio.gather(*map(scorer.judge, asked), return_exceptions=True)
        finally:
            scorer.close()

    return [one.cause if isinstance(one, ScoringFailed) else one.verdict for one in asyncio.run(judge())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.9, 0.95, 0.98])
def test_verdicts_are_the_servers(
    bundle: candor.Bundle, states: numpy.ndarray, alpha: float, kind: Any
) -> None:
    verdicts = candor.judge(bundle, states, rule="sdm", alpha=alpha, estimator=kind)
    expected = served(bundle, states, alpha, kind)
    assert expected[-2:] == ["non_finite", "non_finite"]
    assert list(verdicts)[:-2] == expected[:-2]
    high = {"high"} if bundle.regions[alpha].found else set()
    assert set(verdicts.region.tolist()) == {"low", "ood", "unavailable"} | high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.9])
def test_what_is_let_through_is_what_calibration_counts(
    bundle: candor.Bundle, states: numpy.ndarray, alpha: float, kind: Any
) -> None:
    verdicts = candor.judge(bundle, states, rule="sdm", alpha=alpha, estimator=kind)
    answers = [Labelled(f"{i}", f"{i}", (), "", 1, torch.from_numpy(row)) for i, row in enumerate(states)]
    known = Attempts.measure(bundle.estimator, answers).served(bundle.estimator, alpha, kind)
    assert (~verdicts.abstained).tolist() == known.answered.tolist()
    assert 0 < known.answered.sum() < len(states)


def test_certified_only_by_two_gates_needs_their_certificate(bundle: candor.Bundle) -> None:
    assert bundle.rule is not None
    without = replace(bundle, rule=replace(bundle.rule, terms=replace(bundle.rule.terms, certificates=())))
    states, prompts = numpy.zeros((1, 1158)), numpy.zeros((1, 1152))
    assert candor.judge(without, states, prompt_states=prompts).abstained.all()
    with pytest.raises(ValueError, match=r"needs a certificate of the two gates at alpha 0\.9"):
        candor.judge(without, states, prompt_states=prompts, certified_only=True)


@pytest.fixture(scope="module")
def prompt_states(bundle: candor.Bundle) -> numpy.ndarray:
    """(150, P): near the gate's centre but for some noise, every fifth far off, one broken."""
    assert bundle.rule is not None
    gate = bundle.rule.rule.gate
    noise = 0.02 * torch.randn(150, len(gate.mean), generator=torch.Generator().manual_seed(1))
    prompts = gate.mean + gate.scale * noise
    prompts[::5] += 40 * gate.scale
    prompts[1, 0] = torch.nan
    return prompts.numpy()


@pytest.mark.parametrize("alpha", [0.9, 0.98])
def test_verdicts_by_two_gates_are_the_servers(
    bundle: candor.Bundle, states: numpy.ndarray, prompt_states: numpy.ndarray, alpha: float
) -> None:
    verdicts = candor.judge(bundle, states, prompt_states=prompt_states, alpha=alpha)
    sizes = bundle.manifest.representation.block_sizes(bundle.manifest.model.hidden_size)

    async def judge() -> list[Any]:
        scorer = Scorer(bundle, "lower", timeout_s=60, gates=bundle.rule)
        asked = [
            ScoringRequest(
                HiddenSummary(*torch.from_numpy(row).split(sizes), positions=1, complete=True),
                alpha,
                calibrated=True,
                prompt=PromptStates(*torch.from_numpy(prompt).chunk(2), complete=True),
            )
            for row, prompt in zip(states, prompt_states, strict=True)
        ]
        try:
            return await asyncio.gather(*map(scorer.judge, asked), return_exceptions=True)
        finally:
            scorer.close()

    served = asyncio.run(judge())
    for mine, other in zip(verdicts, served, strict=True):
        if isinstance(other, ScoringFailed):
            assert (mine.reason, other.cause) == ("scoring_unavailable", "non_finite")
        else:
            assert mine == other.verdict
    assert {"out_of_distribution", "scoring_unavailable"} < set(verdicts.reason.tolist())
    measured = ~numpy.isnan(verdicts.score)
    assert measured.sum() == 147
    assert verdicts.certificate == bundle.rule.terms.at(alpha)  # type: ignore[union-attr]
    known = verdicts.prompt_p_value[measured] > 1 / 200
    through = known & (verdicts.score[measured] >= verdicts.certificate.score_min)  # type: ignore[union-attr]
    assert (verdicts.abstained[measured] <= ~through).all()


def test_columns_are_the_rows(bundle: candor.Bundle, states: numpy.ndarray) -> None:
    verdicts = candor.judge(bundle, states, rule="sdm")
    assert len(verdicts) == 150
    assert verdicts.alpha == 0.9  # the lowest
    assert verdicts.certificate == bundle.certificates[0]
    for row, one in enumerate(verdicts):
        assert one == verdicts[row] == verdicts[row - 150]
        assert (one.region, one.reason, one.abstained) == (
            verdicts.region[row],
            verdicts.reason[row],
            verdicts.abstained[row],
        )
        assert (one.certificate is not None) == verdicts.certified[row]
        figures = [
            verdicts.prediction[row],
            verdicts.probability[row],
            verdicts.similarity[row],
            verdicts.rescaled_similarity[row],
            verdicts.distance_quantile[row],
        ]
        if one.figures is None:
            assert one.reason == "scoring_unavailable"
            assert figures[0] == figures[2] == -1
            assert numpy.isnan([figures[1], *figures[3:]]).all()
        else:
            found = one.figures
            assert figures == [
                found.prediction,
                found.probability,
                found.similarity,
                found.rescaled_similarity,
                found.distance_quantile,
            ]
    assert verdicts.certified.any()
    for row in (150, -151):
        with pytest.raises(IndexError):
            verdicts[row]


def test_any_array_and_any_number_of_rows(bundle: candor.Bundle, states: numpy.ndarray) -> None:
    many = numpy.tile(states, (8, 1))  # 1,200: more than are measured at once
    expected = candor.judge(bundle, states, rule="sdm").probability
    readonly = many.astype("float64")
    readonly.setflags(write=False)
    for given in (many, readonly, torch.from_numpy(many).requires_grad_(), many[::-1][::-1]):
        found = candor.judge(bundle, given, rule="sdm").probability
        assert numpy.array_equal(found.reshape(8, 150), numpy.tile(expected, (8, 1)), equal_nan=True)
    assert numpy.array_equal(candor.judge(bundle, states[:3].tolist(), rule="sdm").probability, expected[:3])
    for count in (0, 1):
        few = candor.judge(bundle, states[:count], rule="sdm")
        assert len(few) == len(list(few)) == count
        for column in (few.region, few.reason, few.abstained, few.prediction, few.similarity, few.certified):
            assert column.shape == (count,)


def test_what_departs_from_the_policy_is_never_high(bundle: candor.Bundle, states: numpy.ndarray) -> None:
    free = candor.judge(bundle, states, rule="sdm")
    through = ~free.abstained
    kept = numpy.arange(150) % 2 == 0
    bound = candor.judge(bundle, states, rule="sdm", calibrated=kept)
    assert (bound.abstained == (free.abstained | ~kept)).all()
    assert set(bound.reason[through & ~kept]) == {"uncalibrated_request"}
    assert candor.judge(bundle, states, rule="sdm", calibrated=False).abstained.all()
    assert list(candor.judge(bundle, states, rule="sdm", calibrated=False))[:-2] == served(
        bundle, states[:-2], 0.9, "lower", calibrated=False
    )


def test_certified_only(bundle: candor.Bundle, states: numpy.ndarray) -> None:
    strict = tuple(replace(one, rescaled_similarity_min=60.0) for one in bundle.certificates)
    stricter = replace(bundle, manifest=replace(bundle.manifest, certificates=strict))
    free = candor.judge(stricter, states, rule="sdm")
    bound = candor.judge(stricter, states, rule="sdm", certified_only=True)
    assert (bound.abstained == (free.abstained | ~free.certified)).all()
    assert "not_certified" in bound.reason.tolist()
    assert list(bound)[:-2] == served(stricter, states[:-2], 0.9, "lower", certified_only=True)
    without = replace(bundle, manifest=replace(bundle.manifest, certificates=strict[1:]))
    assert candor.judge(without, states, rule="sdm", estimator="plain", certified_only=True).certified.any()
    with pytest.raises(ValueError, match=r"needs a certificate at alpha 0\.9 under the estimator lower"):
        candor.judge(without, states, rule="sdm", certified_only=True)


@pytest.mark.parametrize(
    ("given", "how", "says"),
    [
        (numpy.zeros((2, 1157)), {}, r"states must be \(n, 1158\), one row an answer; got \(2, 1157\)"),
        (numpy.zeros(1158), {}, r"got \(1158,\)"),
        (numpy.zeros((1, 2, 1158)), {}, r"got \(1, 2, 1158\)"),
        ([["a"] * 1158], {}, "states must be an array of numbers"),
        ([[1.0], [1.0, 2.0]], {}, "states must be an array of numbers"),
        (None, {}, "states must be an array of numbers"),
        (numpy.zeros((2, 1158)), {"alpha": 0.8}, r"of \[0\.9, 0\.95, 0\.98\]; got 0\.8"),
        (numpy.zeros((2, 1158)), {"estimator": "best"}, '"lower" or "plain"; got \'best\''),
        (numpy.zeros((2, 1158)), {"calibrated": [True] * 3}, r"calibrated must be bool, .* \(2,\)"),
        (numpy.zeros((2, 1158)), {"calibrated": [1, 0]}, r"calibrated must be bool"),
        (numpy.zeros((2, 1158)), {"rule": "best"}, "rule must be"),
        (
            numpy.zeros((2, 1158)),
            {"rule": None},
            'need prompt_states, one row an answer .*; or say rule="sdm"',
        ),
        (
            numpy.zeros((2, 1158)),
            {"rule": None, "prompt_states": numpy.zeros((2, 9))},
            r"prompt_states must be \(n, 1152\)",
        ),
        (
            numpy.zeros((2, 1158)),
            {"rule": None, "prompt_states": numpy.zeros((3, 1152))},
            "as many prompt_states as states, 2; got 3",
        ),
    ],
)
def test_what_cannot_be_judged(bundle: candor.Bundle, given: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        candor.judge(bundle, given, **({"rule": "sdm"} | how))
