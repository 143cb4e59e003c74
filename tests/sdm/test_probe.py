"""The probe for declared strangers: by hand, to the bit in any batch, and with the gate in one rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from candor.sdm.gate import PromptGate
from candor.sdm.probe import StrangerProbe
from candor.sdm.rule import AnswerRule, PromptEstimate
from candor.sdm.score import AnswerScore


def rule_without() -> AnswerRule:
    """Its gate knows prompts within about ten of 0."""
    draw = torch.Generator().manual_seed(0)
    gate = PromptGate.fit(
        5 * torch.randn(40, 4, generator=draw), 5 * torch.randn(30, 4, generator=draw), (2, 2), 2, 1
    )
    one = torch.ones((), dtype=torch.float64)
    return AnswerRule(gate, AnswerScore(torch.zeros(6), torch.tensor(0.0), one, one))


def probe(cut: int = 1) -> StrangerProbe:
    """b = 2 s0 - s3; the reference has b = -2, 0, 1 and 4."""
    reference = torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0], [0.0, 0, 0, -1], [-1.0, 0, 0, 0]])
    return StrangerProbe.fit(torch.tensor([2.0, 0.0, 0.0, -1.0]), reference, cut)


def test_by_hand() -> None:
    one = probe()
    assert one.reference.tolist() == [-2.0, 0.0, 1.0, 4.0]
    b = one.distance(torch.tensor([[1.0, 9.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 0.0]]))
    assert b.tolist() == [2.0, 6.0, -18.0]
    assert one.p_value(b).tolist() == [2 / 5, 1 / 5, 5 / 5]
    assert one.known(b).tolist() == [True, False, True]
    assert probe(2).known(b).tolist() == [False, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
def test_a_row_that_is_not_finite_is_never_known(bad: float) -> None:
    b = probe(0).distance(torch.tensor([[-9.0, bad, 0.0, 0.0]]))
    assert b.tolist() == [math.inf]
    assert probe(0).known(b).tolist() == [False]


def test_each_row_has_the_same_value_alone_and_in_any_batch() -> None:
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(40, 700, generator=draw)
    one = StrangerProbe.fit(torch.randn(700, generator=draw), states[:9], 1)
    together = one.distance(states)
    assert torch.cat([one.distance(row.unsqueeze(0)) for row in states]).equal(together)
    assert one.reference.equal(together[:9].sort().values)


def test_a_prompt_must_be_known_to_both() -> None:
    alone = rule_without()
    rule = replace(alone, probe=probe())
    prompts = torch.tensor([[0.0, 0, 0, 0], [3.0, 0, 0, 0], [0.0, 900, 0, 0], [900.0, 0, 0, 0]])
    both, by_gate = rule.know(prompts), alone.know(prompts)
    assert not by_gate.strange.any()
    assert both.strange.tolist() == (~probe().known(probe().distance(prompts))).tolist()
    assert by_gate.known.tolist() == [True, True, False, False]
    assert both.known.tolist() == [True, False, False, False]
    assert both.p_value.equal(by_gate.p_value)
    joined = PromptEstimate.joined([both.row(2), both.row(0)])
    assert (joined.p_value.tolist(), joined.known.tolist(), joined.strange.tolist()) == (
        both.p_value[[2, 0]].tolist(),
        [False, True],
        both.strange[[2, 0]].tolist(),
    )


def test_state_restores_it_to_the_bit() -> None:
    alone = rule_without()
    rule = replace(alone, probe=probe())
    state = rule.state()
    again = AnswerRule.from_state(state)
    assert all(value.equal(again.state()[name]) for name, value in state.items())
    del state["probe.weight"]
    with pytest.raises(ValueError, match="missing"):
        AnswerRule.from_state(state)


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, 4\)"):
        probe().distance(torch.zeros(2, 5))
