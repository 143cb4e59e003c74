"""What each part of the data is for: halves share no prompt, the held-out part touches nothing, and the
fit repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from candor.calibration.data import Label
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.fit import FitSettings, fit, set_aside, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.engine.base import Representation
from candor.sdm.adaptor import Block

SMALL = FitSettings(alphas=(0.8, 0.9), rounds=2, epochs=4, exemplar_dim=6, learning_rate=1e-2)
BLOCKS: tuple[Block, ...] = ((3, "scalar"),)


def drawn(n: int, seed: int = 0, share: float = 0.5) -> list[Labelled]:
    """n answers of n prompts in R^3; the first entry tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < share).long()
    h = torch.randn(n, 3, generator=generator)
    h[:, 0] += 3 * labels
    return [
        Labelled(
            f"id{i}",
            f"digest{i}",
            ({"role": "user", "content": f"prompt {i}"},),
            "r",
            1 if label else 0,
            h[i],
        )
        for i, label in enumerate(labels.tolist())
    ]


def nothing(_: int) -> None: ...


def test_halves_cover_the_usable_answers_share_no_prompt_and_keep_the_base_rate() -> None:
    answers = drawn(200, share=0.3)
    twins = [replace(answer, id=answer.id + "'", h=answer.h + 0.1) for answer in answers[:60]]
    broken = replace(
        answers[0], id="broken", prompt_digest="b", fault="non_finite", h=answers[0].h * torch.nan
    )
    fitted = fit([*answers, *twins, broken], BLOCKS, SMALL, nothing)
    assert {a.id for a in fitted.answers} == {a.id for a in [*answers, *twins]}
    assert len(fitted.answers) == 260
    training, calibration = (
        {a.prompt_digest for a in half} for half in (fitted.training, fitted.calibration)
    )
    assert not training & calibration
    ones = [sum(a.label for a in half) for half in (fitted.training, fitted.calibration)]
    assert abs(ones[0] - ones[1]) <= 2
    assert abs(len(fitted.training) - len(fitted.calibration)) <= 4


def test_the_support_is_the_training_half_in_its_order() -> None:
    fitted = fit(drawn(120), BLOCKS, SMALL, nothing)
    assert fitted.estimator.support.labels.tolist() == [a.label for a in fitted.training]
    # A support row finds itself at distance 0.
    seen = fitted.estimator.measure(torch.stack([a.h for a in fitted.training]))
    assert seen.nearest.tolist() == list(range(len(fitted.training)))
    assert fitted.estimator.calibration.labels.tolist() == [a.label for a in fitted.calibration]


def test_the_same_seed_gives_the_same_estimator_and_another_gives_another() -> None:
    answers = drawn(120)
    first, second = (fit(answers, BLOCKS, SMALL, nothing).estimator.state() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    other = fit(answers, BLOCKS, replace(SMALL, seed=1), nothing).estimator.state()
    assert not first["support.h_prime"].equal(other["support.h_prime"])


def test_the_lowest_loss_of_all_rounds_wins() -> None:
    done: list[int] = []
    fitted = fit(drawn(120), BLOCKS, replace(SMALL, rounds=4), done.append)
    assert len(fitted.chosen.losses) == 4
    assert fitted.chosen.losses[fitted.chosen.round] == min(fitted.chosen.losses)
    assert sum(done) == 4 * SMALL.epochs


def test_every_alpha_gets_a_region_and_a_separable_task_admits() -> None:
    fitted = fit(drawn(300), BLOCKS, replace(SMALL, rounds=1, epochs=15), nothing)
    assert list(fitted.estimator.regions) == [0.8, 0.9]
    estimate = fitted.estimator.estimate(torch.stack([a.h for a in drawn(200, seed=9)]), 0.8)
    assert estimate.admitted.any()


def test_setting_aside_is_stratified_disjoint_and_seeded() -> None:
    answers = drawn(100, share=0.4)
    fitting, held_out = set_aside(answers, 0.2, seed=3)
    assert {a.id for a in fitting} | {a.id for a in held_out} == {a.id for a in answers}
    assert not {a.prompt_digest for a in fitting} & {a.prompt_digest for a in held_out}
    ones = sum(a.label for a in answers)
    assert abs(sum(a.label for a in held_out) - 0.2 * ones) < 1
    assert [a.id for a in held_out] == [a.id for a in set_aside(answers, 0.2, seed=3)[1]]
    assert [a.id for a in held_out] != [a.id for a in set_aside(answers, 0.2, seed=4)[1]]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label: Label) -> None:
    answers = [replace(a, label=label) for a in drawn(50)]
    with pytest.raises(DataError, match="both right and wrong answers"):
        fit(answers, BLOCKS, SMALL, nothing)


def test_no_usable_answer_says_what_was_dropped() -> None:
    answers = [replace(a, fault="truncated") for a in drawn(50)]
    with pytest.raises(DataError, match="50 truncated"):
        fit(answers, BLOCKS, SMALL, nothing)


def test_too_few_prompts_are_refused_at_the_number_that_a_region_takes() -> None:
    # alpha = 0.8 needs 5 calibration points of each class, so 10 prompts of each to halve.
    answers = drawn(300)
    wrong, right = ([a for a in answers if a.label == label] for label in (0, 1))
    fit(wrong[:10] + right, BLOCKS, SMALL, nothing)
    with pytest.raises(DataError, match=r"at least 10 prompts of each kind.*got .* 9 answered wrong"):
        fit(wrong[:9] + right, BLOCKS, SMALL, nothing)
    twins = [replace(a, id=a.id + "'") for a in wrong[:9]]
    with pytest.raises(DataError, match="9 answered wrong"):
        fit(wrong[:9] + twins + right, BLOCKS, SMALL, nothing)


def test_training_that_diverges_says_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"round 0 cannot be trained.*lower --learning-rate"):
        fit(drawn(60), BLOCKS, replace(SMALL, learning_rate=1e30), nothing)


def test_blocks_are_the_papers_two_scalars_without_evidence_and_by_part_with_it() -> None:
    assert standardisation_blocks(Representation(), 16) == ((32, "scalar"),)
    with_evidence = Representation(order=("last", "evidence", "mean"), evidence=("log_length", "min_margin"))
    assert standardisation_blocks(with_evidence, 16) == ((16, "scalar"), (2, "feature"), (16, "scalar"))


@pytest.mark.parametrize(
    "change",
    [
        {"alphas": ()},
        {"alphas": (0.5,)},
        {"alphas": (0.9, 1.0)},
        {"alphas": (95.0,)},
        {"rounds": 0},
        {"epochs": 0},
        {"exemplar_dim": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
    ],
)
def test_settings_out_of_range(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        FitSettings(**({"alphas": (0.9,)} | change))  # type: ignore[arg-type]
