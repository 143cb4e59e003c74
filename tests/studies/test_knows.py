"""The study of what a state knows: packed sequences, the pairs' loss, a run that was stopped, the fitted curve."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import typer
from torch.nn import functional as F

from studies.knows import probe
from studies.knows.curve import answerable, power_law, wanted
from studies.knows.packed import Asked, first_answers, pack


def asked(name: int, prompt: list[int], *answers: list[int]) -> Asked:
    m = len(answers)
    return Asked(
        str(name),
        tuple(prompt),
        tuple(map(tuple, answers)),
        torch.tensor([float(i % 2) for i in range(m)]),
        torch.tensor([float(i + 1) for i in range(m)]),
        torch.zeros(m, 6),
        torch.randn(m, 32, generator=torch.Generator().manual_seed(name)),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


def test_packed_states_are_those_of_single_sequences(tiny: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    some = [asked(0, [1, 2, 3], [4, 5], [6, 7, 8]), asked(1, [9, 10], [11, 12, 13, 14])]
    packed = pack(some, torch.float32)
    with torch.no_grad():
        states = model.model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.mask)[
            0
        ].flatten(0, 1)
        alone = [
            model.model(torch.tensor([[*one.prompt, *answer]]))[0][0]
            for one in some
            for answer in one.answers
        ]
    assert torch.allclose(states[packed.tag], torch.stack([one[-1] for one in alone]), atol=1e-5)
    assert packed.group.tolist() == [0, 0, 1]
    # What predicts an answer's tokens: the prompt's last position, once, and each answer's own but its last.
    first, second, third = alone
    expected = torch.cat([first[2:4], second[3:5], third[1:5]])
    assert torch.allclose(states[packed.held], expected, atol=1e-5)


def test_contrast_is_the_mean_over_pairs_of_one_prompt() -> None:
    f = torch.tensor([1.0, -0.5, 2.0, 0.3])
    label, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])
    wanted = (F.softplus(torch.tensor(-1.5)) + F.softplus(torch.tensor(1.0))) / 2
    assert torch.isclose(probe.contrast(f, label, group), wanted)
    assert probe.contrast(f[3:], label[3:], group[3:]) == 0


def test_answers_are_counted_as_often_as_they_were_given() -> None:
    some = [asked(i, [1], [2], [3]) for i in range(10)]  # three answers a prompt
    assert len(first_answers(some, 9, seed=0)) == 3
    assert first_answers(some, 9, seed=0)[:2] == first_answers(some, 6, seed=0)


def test_a_stopped_run_ends_as_one_that_was_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CHECKPOINT_EVERY", 2)
    some = [asked(i, [1, 2, i + 3], [4, 5 + i], [6, 7, 8]) for i in range(8)]
    settings = probe.Settings(16, epochs=2, prompts=2, depth=1.0, learning_rate=1e-2)
    whole = probe.train(some, tiny, tmp_path / "whole", settings)
    probe.train(some, tiny, tmp_path / "parts", replace(settings, steps=3))
    parts = probe.train(some, tiny, tmp_path / "parts", settings)
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(parts.named_parameters())[name]), name
    begun = probe.load(tiny, settings, 0)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), begun.parameters(), strict=True))
    f, states = probe.judged(whole, some)
    assert f.shape == (16,)
    assert states.shape == (16, 32)


def test_fitted_curve_finds_the_law_that_made_it() -> None:
    sizes = (500, 1000, 2000, 4000, 8000)
    errors = 0.05 + 3 * numpy.asarray(sizes, float) ** -0.5
    floor, scale, power = power_law(sizes, errors)
    assert (floor, scale, power) == (
        pytest.approx(0.05, abs=1e-3),
        pytest.approx(3, rel=0.05),
        pytest.approx(0.5, abs=0.02),
    )


def test_what_an_auc_lets_through() -> None:
    drawn = torch.Generator().manual_seed(0)
    n, auc, share_right = 400_000, 0.9, 0.5
    y = torch.rand(n, generator=drawn) < share_right
    apart = 2**0.5 * float(torch.special.ndtri(torch.tensor(auc)))
    scores = torch.randn(n, generator=drawn) + apart * y
    order = scores.argsort(descending=True)
    good = y[order].double().cumsum(0) / torch.arange(1, n + 1)
    through = float((good >= 0.9).nonzero()[-1] + 1) / n
    assert answerable(share_right, auc, 0.9) == pytest.approx(through, abs=0.01)
    assert wanted(0.9, 0.95, 0.95) == "no AUC"  # the ceiling is 0.9 / 0.95


def test_the_whole_study_calls_its_modules_by_options_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    from studies.knows import __main__ as whole

    for name in ("train", "held", "calibration", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * 3, encoding="utf-8")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    whole.main(tmp_path / "model", tmp_path, tmp_path / "out", steps=2, records=2)
    assert (tmp_path / "out/train.jsonl").read_text(encoding="utf-8") == "{}\n" * 2
    called = []
    for command in commands:
        at = max(i for i, part in enumerate(command) if part == "-m") + 1
        called.append(command[at].rpartition(".")[2])
        app = typer.Typer()
        app.command()(import_module(command[at]).main)
        typer.main.get_command(app).make_context(command[at], command[at + 1 :])
    assert called == ["answers", "probe", "answers", "answers", "curve", "table"]
    assert "accelerate.commands.launch" in commands[1]
