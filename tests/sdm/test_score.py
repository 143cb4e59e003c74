"""The answers' score and the rule of both gates: by hand, to the bit in any batch, and where rows are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from candor.sdm.gate import PromptGate
from candor.sdm.outputs import Measurement
from candor.sdm.rule import AnswerRule
from candor.sdm.score import AnswerScore, sdm_figures


def measured(z: list[list[float]], y_hat: list[int], q: list[int], finite: list[bool]) -> Measurement:
    n = len(z)
    zeros = torch.zeros(n)
    return Measurement(
        torch.zeros(n, 3),
        torch.tensor(z),
        torch.tensor(y_hat),
        torch.tensor(q),
        zeros,
        zeros.long(),
        torch.tensor(finite),
    )


def score_of(
    weight: list[float], bias: float = 0.0, slope: float = 1.0, intercept: float = 0.0
) -> AnswerScore:
    double = torch.float64
    return AnswerScore(
        torch.tensor(weight),
        torch.tensor(bias),
        torch.tensor(slope, dtype=double),
        torch.tensor(intercept, dtype=double),
    )


def gate_of(cut: int = 1) -> PromptGate:
    draw = torch.Generator().manual_seed(0)
    return PromptGate.fit(
        torch.randn(40, 4, generator=draw), torch.randn(30, 4, generator=draw), (2, 2), 2, cut
    )


def test_figures_by_hand() -> None:
    seen = measured([[1.0, 3.0], [2.0, 0.5], [0.0, 0.0]], [1, 0, 0], [8, 3, 0], [True, True, False])
    d = torch.tensor([0.5, 1.0, 0.0])
    expected = [
        [2.0, math.log(10), 0.5, 0.5 * math.log(10) * 2],
        [-1.5, -math.log(5), 1.0, -1.5 * math.log(5)],
        [0.0, -math.log(2), 0.0, 0.0],
    ]
    torch.testing.assert_close(sdm_figures(seen, d), torch.tensor(expected))


def test_figures_speak_of_two_classes() -> None:
    seen = measured([[1.0, 3.0, 0.0]], [1], [8], [True])
    with pytest.raises(ValueError, match="expected 2 classes, got 3"):
        sdm_figures(seen, torch.ones(1))


def test_score_and_probability_by_hand() -> None:
    score = score_of([2.0, -1.0, 0.5], bias=1.0, slope=2.0, intercept=-1.0)
    value = score(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0]]))
    assert value.tolist() == [2.0]  # 2 - 3 + 2 + 1
    assert float(score.probability(value)) == pytest.approx(1 / (1 + math.exp(-3)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_a_row_that_is_not_finite_is_never_right(bad: float) -> None:
    score = score_of([1.0, 1.0], slope=-1.0)  # a slope by which -inf would be sure
    h = torch.tensor([[1.0, 2.0], [bad, 2.0]])
    value = score(torch.empty(2, 0), h, torch.empty(2, 0))
    assert value.tolist() == [3.0, -math.inf]
    assert float(score.probability(value)[1]) == 0.0


def test_each_row_has_the_same_score_alone_and_in_any_batch() -> None:
    draw = torch.Generator().manual_seed(1)
    h, figures = torch.randn(70, 900, generator=draw) * 10, torch.randn(70, 4, generator=draw)
    score = score_of(torch.randn(904, generator=draw).tolist(), bias=0.3)
    prompts = torch.empty(70, 0)
    together = score(prompts, h, figures)
    alone = [score(prompts[:1], a.unsqueeze(0), b.unsqueeze(0)) for a, b in zip(h, figures, strict=True)]
    assert torch.cat(alone).equal(together)
    exact = [
        math.fsum([*(torch.cat([a, b]).double() * score.weight.double()).tolist(), float(score.bias)])
        for a, b in zip(h, figures, strict=True)
    ]
    assert together.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()


RULE = AnswerRule(gate_of(), score_of([0.0, 0.0, 0.0, 0.0, 1.0, 0.0]))


def rows(values: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Known prompts but the last, which is far off; scores as given."""
    prompts = torch.zeros(len(values), 4)
    prompts[-1] = 1e3
    h = torch.zeros(len(values), 2)
    h[:, 0] = torch.tensor(values)
    return prompts, h, torch.empty(len(values), 0)


def test_the_rule_is_gate_and_score() -> None:
    found = RULE.judge(*rows([0.5, 0.4999, math.nan, 2.0]))
    assert found.known.tolist() == [True, True, True, False]
    assert found.score.tolist() == [0.5, pytest.approx(0.4999), -math.inf, 2.0]
    assert float(found.p_value[-1]) == pytest.approx(1 / 31)
    assert found.probability[2] == 0


def test_state_restores_a_rule_to_the_bit() -> None:
    again = AnswerRule.from_state(RULE.state())
    given = rows([0.1, 0.3, 0.0999, 5.0])
    for name, value in vars(RULE.judge(*given)).items():
        assert getattr(again.judge(*given), name).equal(value), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("gate.scale"), "scale"),
        (lambda state: state.update({"score.more": torch.zeros(1)}), "more"),
        (lambda state: state.update({"other": torch.zeros(1)}), "other"),
        (lambda state: state.update({"score.bias": torch.zeros(2)}), "bias"),
    ],
)
def test_a_state_that_does_not_fit_is_named(change, said: str) -> None:  # type: ignore[no-untyped-def]
    state = RULE.state()
    change(state)
    with pytest.raises(ValueError, match=said):
        AnswerRule.from_state(state)
