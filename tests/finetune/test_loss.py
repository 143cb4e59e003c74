"""Next-token losses: by hand, against cross-entropy, masks, and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from candor.finetune.loss import MASKED, next_token_loss, sdm_next_token_loss, verification_loss


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (3, 6), generator=generator)
    labels[:, :2] = MASKED
    labels[1, 4:] = MASKED
    return torch.randn(3, 6, 9, generator=generator), labels


def test_by_hand() -> None:
    # One target, base 2 + SDM = 2.5: weights are 2.5^z.
    logits, labels = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[MASKED, 0]])
    got = sdm_next_token_loss(logits, labels, torch.tensor([0.5]))
    assert got.item() == pytest.approx(-math.log(2.5 / 3.5, 2.5))


def test_base_e_is_cross_entropy() -> None:
    logits, labels = batch()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=MASKED)
    assert next_token_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sdm_next_token_loss(logits, labels, torch.full((3,), math.e - 2)).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    nowhere = torch.full((3,), MASKED)
    assert verification_loss(logits, labels, torch.ones(3), torch.zeros(3), nowhere).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_gradient_is_the_residual_and_a_smaller_base_leaves_a_larger_one() -> None:
    logits, labels = batch()
    reward = torch.tensor([0.0, 0.5, 1.0])
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sdm_next_token_loss(leaf, labels, reward), leaf)
    targets = labels[:, 1:]
    known = targets != MASKED
    chances = torch.softmax(logits[:, :-1] * torch.log(2 + reward)[:, None, None], dim=2)
    residual = (chances - F.one_hot(targets.clamp(min=0), 9)) * known.unsqueeze(2) / known.sum()
    assert torch.allclose(gradient[:, :-1], residual, atol=1e-6)
    assert not gradient[:, -1].any()

    sure = torch.tensor([[[4.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    label = torch.tensor([[MASKED, 0]])
    sizes = [
        torch.autograd.grad(sdm_next_token_loss(sure, label, torch.tensor([r])), sure)[0].abs().max().item()
        for r in (0.0, 1.0)
    ]
    assert sizes[0] > sizes[1]


def test_the_verdict_s_position_alone_has_base_two_plus_q() -> None:
    logits, labels = batch()
    q, d = torch.tensor([3.0, 0.0, 100.0]), torch.tensor([0.5, 1.0, 0.0])
    position = torch.tensor([5, MASKED, 4])
    total, count = 0.0, 0
    for b in range(3):
        for t in range(1, 6):
            if labels[b, t] == MASKED:
                continue
            base, scale = (2 + float(q[b]), float(d[b])) if t == position[b] else (math.e, 1.0)
            chances = torch.softmax(logits[b, t - 1].double() * scale * math.log(base), dim=0)
            total -= math.log(float(chances[labels[b, t]]), base)
            count += 1
    assert verification_loss(logits, labels, q, d, position).item() == pytest.approx(total / count, rel=1e-5)


def test_no_target_is_no_loss() -> None:
    logits, labels = batch()
    leaf = logits.requires_grad_()
    loss = sdm_next_token_loss(leaf, torch.full_like(labels, MASKED), torch.zeros(3))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == 0.0
    assert not gradient.any()
