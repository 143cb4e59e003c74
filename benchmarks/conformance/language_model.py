"""Checks next-token losses with their gradients, and the texts of an SDM language model."""

from __future__ import annotations

from itertools import count

import torch

from benchmarks.conformance.fixture import Fixture, Tally
from candor.finetune.encoding import hard_negative, parse, verification_input
from candor.finetune.loss import next_token_loss, sdm_next_token_loss, verification_loss


def check_losses(f: Fixture, t: Tally) -> None:
    for i in count():
        p = f"lm{i}"
        if f"{p}_logits" not in f:
            break
        labels, q, d = f[f"{p}_labels"], f[f"{p}_q"].squeeze(1), f[f"{p}_d"].squeeze(1)
        leaf = f[f"{p}_logits"].clone().requires_grad_()
        losses = {
            "reward": sdm_next_token_loss(leaf, labels, f[f"{p}_sdm_at_reward"].squeeze(1)),
            "yesno": verification_loss(leaf, labels, q, d, f[f"{p}_yesno_pos"]),
            "ce": next_token_loss(leaf, labels),
        }
        for name, loss in losses.items():
            t.close(f"{p}_{name}_loss", loss.detach().reshape(1), f[f"{p}_{name}_loss"])
            if name != "ce":
                # Compared on the scale of one target's gradient, as the mean's shrinks with their number.
                targets = (labels[:, 1:] >= 0).sum()
                (gradient,) = torch.autograd.grad(loss, leaf)
                t.close(f"{p}_{name}_grad", gradient * targets, f[f"{p}_{name}_grad"] * targets)


def check_texts(f: Fixture, t: Tally) -> None:
    for case in f.settings:
        generated, parsed = case["generated"], parse(case["generated"])
        for name, got in {
            "hard_negative_response": hard_negative(generated),
            "verification_input": verification_input(generated),
            "parsed_sentences": parsed.sentences,
            "parsed_verifications": parsed.verifications,
        }.items():
            t.true(name, torch.tensor([got == case[name]]))
