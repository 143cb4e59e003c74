"""Advice against cases worked out by hand, and against the world that it is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from candor.calibration.advice import Shortfall, advise, of_rule, shortfall
from candor.calibration.certificate import Claim, Step
from candor.calibration.fit import FitSettings
from candor.calibration.generate import Labelled
from candor.calibration.rule_certificate import Outlook, RuleCertification
from candor.calibration.run import Outcome, calibrate_answers
from candor.policy.certificate import RuleCertificate
from candor.sdm.region import find_region


def points(*rows: tuple[float, int, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of (q', label, SDM of the label)."""
    own = torch.tensor([row[2] for row in rows])
    labels = torch.tensor([row[1] for row in rows])
    sdm = torch.where(torch.nn.functional.one_hot(labels, 2) == 1, own.unsqueeze(1), 1 - own.unsqueeze(1))
    return sdm, torch.tensor([row[0] for row in rows]), labels


def test_a_class_that_lacks_points() -> None:
    given = points(*[(5.0 + i, 1, 0.99) for i in range(12)], *[(5.0 + i, 0, 0.99) for i in range(7)])
    assert not find_region(*given, 0.9).found
    found = shortfall(*given, 0.9)
    assert found == Shortfall(0.9, 5.0, (7, 12), 10, (0, 0), (0, 1))
    assert found.factor == pytest.approx(10 / 7)
    assert str(found) == (
        "no region at alpha 0.9: where least is wanting (q' >= 5), the wrong answers have 7 of the 10 points needed"
    )


def test_a_class_that_the_score_cannot_tell() -> None:
    unsure = [(5.0, 0, 0.2)] * 4
    given = points(*[(5.0, 1, 0.99)] * 20, *[(5.0, 0, 0.99)] * 16, *unsure)
    assert not find_region(*given, 0.9).found
    found = shortfall(*given, 0.9)
    assert found == Shortfall(0.9, 5.0, (20, 20), 10, (4, 0), (2, 2))
    assert found.factor is None
    assert "4 of 20 wrong answers are not told with probability 0.9, and 2 may be" in str(found)


def test_nothing_near_is_no_threshold() -> None:
    assert shortfall(*points((0.0, 1, 0.9), (0.0, 0, 0.9)), 0.9) is None


def test_there_is_a_shortfall_exactly_where_there_is_no_region() -> None:
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        n = int(torch.randint(5, 60, (1,), generator=generator))
        labels = torch.randint(0, 2, (n,), generator=generator)
        own = 0.89 + 0.11 * torch.rand(n, generator=generator)
        sdm = torch.where(torch.nn.functional.one_hot(labels, 2) == 1, own.unsqueeze(1), 1 - own.unsqueeze(1))
        q_prime = torch.randint(0, 30, (n,), generator=generator).float()
        wanting = shortfall(sdm, q_prime, labels, 0.9)
        has_region = find_region(sdm, q_prime, labels, 0.9).found
        found += has_region
        if has_region:
            assert wanting is not None
            short = min(wanting.points) < wanting.needed
            excess = any(u > a for u, a in zip(wanting.under, wanting.allowed, strict=True))
            assert not short
            assert not excess
    assert 20 < found < 180


SETTINGS = FitSettings((0.9,), rounds=1, epochs=30, exemplar_dim=8, learning_rate=0.05)


def world(n: int, apart: float, share: float = 0.5, seed: int = 0, **more: Any) -> list[Labelled]:
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for i in range(n):
        label: Any = int(torch.rand(1, generator=generator) < share)
        h = torch.randn(4, generator=generator) + apart * label
        answers.append(Labelled(str(i), str(i), (), "", label, h, **more))
    return answers


def outcome(answers: list[Labelled]) -> Outcome:
    return calibrate_answers(answers, ((4, "scalar"),), SETTINGS, progress=lambda _: None)


def test_good_data_needs_none() -> None:
    made = outcome(world(600, 4.0, share=0.7))
    assert made.report["regions"]["0.9"]["found"]
    assert (made.advice.holds_back, made.advice.helps) == ([], [])
    assert made.report["advice"] == made.advice.to_json()


def test_a_model_at_chance() -> None:
    advice = outcome(world(400, 0.0)).advice
    assert any("hardly tells right from wrong: AUROC 0." in one for one in advice.holds_back)
    assert any("no region at alpha 0.9" in one for one in advice.holds_back)
    assert any("fine-tuning" in one for one in advice.helps)


def test_where_most_answers_are_wrong_better_ones_help() -> None:
    advice = outcome(world(600, 4.0, share=0.4)).advice
    assert any("no rule can let more than 4" in one for one in advice.holds_back)
    assert any(one.startswith("better answers") for one in advice.helps)


def test_a_rare_class_and_how_many_records_it_takes() -> None:
    advice = outcome(world(600, 6.0, share=0.93)).advice
    assert any(one.startswith("only ") and "are wrong" in one for one in advice.holds_back)
    assert any("harder records" in one for one in advice.helps)


def test_labels_that_were_turned_are_among_the_suspects() -> None:
    answers = world(800, 5.0)
    turned = {str(i) for i in range(0, 800, 20)}
    made = outcome([
        Labelled(one.id, one.prompt_digest, (), "", 1 - one.label if one.id in turned else one.label, one.h)  # type: ignore[arg-type]
        for one in answers
    ])  # fmt: skip
    named = [one.id for one in made.advice.suspects]
    fitted = turned & {one.id for one in made.fitted.answers}
    assert len(fitted & set(named)) >= 0.8 * len(fitted)
    assert len(turned & set(named)) >= 0.8 * len(named)
    first = made.advice.suspects[0]
    assert (first.id in turned, first.against) == (True, 10)
    assert first.twin not in turned


def search(
    steps: list[tuple[int, int]], more: tuple[Outlook, ...] = (), answered: tuple[int, int] | None = None
) -> RuleCertification:
    """Of 400 records, 300 of them right, at alpha 0.9. answered: (let through, right) of a certificate."""
    made = None
    if answered is not None:
        made = RuleCertificate(0.9, 0.9, 0.95, 1.0, 400, answered[0], answered[1], 300, 0.91)
    prompts = frozenset(map(str, range(400)))
    tried = tuple(Step(1.0, n, right, 0.5, False) for n, right in steps)
    return RuleCertification(0.9, Claim(0.9, 0.05), prompts, 300, 3, tried, made, more, 50, ())


def test_too_few_to_show_anything() -> None:
    held, helps = of_rule(search([(28, 28)], (Outlook(400, 0.0), Outlook(800, 0.071))))
    assert held == [
        "alpha 0.9: no certificate: 28 records reach the score at which the search begins, and 29, all right, are "
        "the fewest that show an accuracy of 0.9"
    ]
    assert 0.9**29 <= 0.05 < 0.9**28
    assert helps == [
        "alpha 0.9: 800 records to certify on, in place of 400, for 7.1% answered, were this the truth"
    ]


def test_too_many_of_them_wrong() -> None:
    held, helps = of_rule(search([(100, 92)], (Outlook(400, 0.0), Outlook(3_200, 0.0))))
    assert held[0].endswith("92 of 100 are right, which does not show an accuracy of 0.9")
    assert helps == ["a lower --alpha than 0.9: more records would not bring this one"]


def test_a_certificate_far_below_the_ceiling() -> None:
    """No rule can answer more than 0.75 / 0.9 of the prompts."""
    more = (Outlook(400, 0.3), Outlook(800, 0.35))
    held, helps = of_rule(search([], more, (120, 115)))
    assert held[0].startswith("alpha 0.9: 30.0% answered of the 83.3% that any rule could answer")
    assert "800 records to certify on, in place of 400, for 35.0% answered" in helps[0]
    assert of_rule(search([], more, (170, 160))) == ([], [])


def test_with_two_gates_advice_speaks_of_what_they_lack() -> None:
    found = outcome(world(400, 0.0))
    assert any("no region" in one for one in found.advice.holds_back)
    advice = advise(found.fitted, world(400, 0.0), found.evaluation, [search([(100, 92)])])
    assert not any("region" in one for one in advice.holds_back)
    assert any(one.startswith("alpha 0.9: no certificate") for one in advice.holds_back)
    assert any("hardly tells right from wrong" in one for one in advice.holds_back)
