"""Losses at one position, by hand and by what they reduce to; a teacher's recalibration."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from candor.calibration.epochs import LayerSettings
from candor.finetune import objectives
from candor.finetune.supervision import Supervision
from candor.finetune.teacher import TopTokens, choose_c, expected_calibration_error
from candor.finetune.uncertainty import smoothing

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 7, generator=GENERATOR)
TARGETS = torch.tensor([0, 6, 3, 3, 1])


def test_cross_entropy_is_torchs() -> None:
    expected = F.cross_entropy(LOGITS, TARGETS, reduction="none")
    assert torch.allclose(objectives.cross_entropy(LOGITS, TARGETS), expected)


def test_sdm_loss_at_base_two_and_three() -> None:
    for value in (0.0, 1.0):
        beta = 2 + value
        p = torch.softmax(LOGITS * math.log(beta), dim=1)[torch.arange(5), TARGETS]
        expected = -p.log() / math.log(beta)
        assert torch.allclose(objectives.sdm_loss(LOGITS, TARGETS, torch.full((5,), value)), expected)


def test_smoothing_by_hand_and_none() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    found = objectives.smoothed_cross_entropy(logits, torch.tensor([0]), torch.tensor([0.3]))
    by_hand = -(0.7 * math.log(0.5) + 0.1 * (math.log(0.5) + 2 * math.log(0.25)))
    assert float(found) == pytest.approx(by_hand)
    none = objectives.smoothed_cross_entropy(LOGITS, TARGETS, torch.zeros(5))
    assert torch.allclose(none, objectives.cross_entropy(LOGITS, TARGETS))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    top = TopTokens.of(LOGITS)
    same = torch.softmax(LOGITS.gather(1, top.ids), dim=1)
    assert torch.allclose(objectives.distillation(LOGITS, top.ids, same), torch.zeros(5), atol=1e-6)
    other = objectives.distillation(LOGITS, top.ids, torch.full((5, 5), 0.2))
    assert (other > 0).all()


def test_smoothing_rises_with_failures_to_its_cap() -> None:
    e = smoothing(torch.tensor([0.0, 0.1, 0.1, 0.8]))
    assert torch.allclose(e, torch.tensor([0.0, 0.04, 0.04, 0.3]))
    assert smoothing(torch.zeros(3)).tolist() == [0, 0, 0]


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.15, 1.0])
    right = torch.tensor([True, False, False, True])
    # bin 9: three with confidences 0.95, 0.95, 1.0, two right; bin 1: one
    assert expected_calibration_error(confidence, right) == pytest.approx((2.9 - 2 + 0.15) / 4)


def test_c_makes_an_unsure_teacher_as_sure_as_it_is_right() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).expand(400, 5)
    ids = torch.arange(5).expand(400, 5)
    targets = (torch.arange(400) % 10 == 0).long()  # the likeliest token is right nine times in ten
    c = choose_c([(TopTokens(ids, probabilities), targets)])
    confidence = float(TopTokens(ids, probabilities).recalibrated(c)[0, 0])
    assert confidence == pytest.approx(0.9, abs=0.05)


def test_supervision_leaves_a_document_out_of_its_own_comparison() -> None:
    """A document of the support scored with the very state it has there is not its own neighbour; state is
    restored to the bit."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(80) % 2
    h = torch.randn(80, 6, generator=generator) + 3 * y.unsqueeze(1)
    made = Supervision.train(h, y, LayerSettings(exemplar_dim=4, epochs=20, learning_rate=1e-2), seed=0)
    numbers = torch.arange(80)
    value = made.sdm_at(h, numbers, y)
    assert ((value >= 0) & (value <= 1)).all()
    assert value[y == 1].mean() > 0.6
    again = Supervision.from_state(made.state()).sdm_at(h, numbers, y)
    assert torch.equal(value, again)
    # Lone outlier of the wrong class: known to itself alone, so nothing vouches for it.
    far = h.clone()
    inside = int((made.row >= 0).nonzero()[0])
    far[inside] = 1e3
    assert float(made.sdm_at(far, numbers, y)[inside]) == pytest.approx(0.5)
    other = made.sdm_at(h, numbers, 1 - y)
    assert torch.allclose(value + other, torch.ones(80), atol=1e-5)
