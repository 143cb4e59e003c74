"""The study of what a state knows: what is taken to learn from, the fitted curve, the whole of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy
import pytest
import torch
import typer

from candor.app.cli import cli
from studies.knows.curve import Answers, answerable, power_law, wanted
from studies.two_gates.answers import Answered


def test_answers_to_random_prompts_are_taken_together() -> None:
    n, hidden = 30, 4
    answered = Answered(
        torch.zeros(n, 2 * hidden),
        torch.arange(n, dtype=torch.float32).unsqueeze(1).repeat(1, 2 * hidden + 6),
        torch.arange(n) % 2,
        torch.arange(n) != 0,  # the first was cut
        tuple(f"{i // 3}" for i in range(n)),
        ("",) * n,
    )
    every = Answers(answered)
    assert every.state.shape == (n - 1, hidden)
    some, more = every.first(9, seed=0), every.first(15, seed=0)
    assert 9 <= len(some.label) <= 11
    assert all(some.digests.count(digest) == every.digests.count(digest) for digest in some.digests)
    assert more.digests[: len(some.digests)] == some.digests
    assert torch.equal(some.state[:, 0] % 2, some.label.float())


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
    whole.main(tmp_path / "model", tmp_path, tmp_path / "out", records=2)
    assert (tmp_path / "out/train.jsonl").read_text(encoding="utf-8") == "{}\n" * 2
    called = []
    for command in commands:
        at = max(i for i, part in enumerate(command) if part == "-m") + 1
        called.append(command[at].rpartition(".")[2])
        app = cli if command[at] == "candor.app.cli" else typer.Typer()
        if app is not cli:
            app.command()(import_module(command[at]).main)
        found = typer.main.get_command(app)
        context = found.make_context(command[at], command[at + 1 :])
        if isinstance(found, typer.core.TyperGroup):
            name, chosen, rest = found.resolve_command(context, command[at + 1 :])
            assert chosen is not None
            chosen.make_context(name, rest)
    assert called == ["cli", "answers", "answers", "answers", "curve", "table"]
    assert "accelerate.commands.launch" in commands[0]
