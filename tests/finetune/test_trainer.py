"""Whole runs on a tiny model: every loss trains, a stopped run ends as one that was not, two processes as one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from candor.calibration.epochs import LayerSettings
from candor.finetune.data import Pair
from candor.finetune.errors import FinetuneError
from candor.finetune.settings import FinetuneSettings
from candor.finetune.trainer import Trainer
from tests.finetune.conftest import run_until

pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate, peft and tensorboard warn of themselves

SETTINGS = FinetuneSettings(
    epochs=2,
    batch_size=8,
    micro_batch=8,
    learning_rate=1e-2,
    lora_rank=4,
    gamma_gen=1.0,
    gamma_diversity=1.0,
    system_prompt="Put the words in order.",
    max_tokens=4,
    layer=LayerSettings(exemplar_dim=8, epochs=3, learning_rate=1e-3),
    generate_ahead=2,
    checkpoint_every=2,
    bf16=False,
    compile=False,
)


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("loss", "rank"), [("sdm", 0), ("ual", 0)])
def test_a_run_learns_and_leaves_a_model(
    loss: Any, rank: int, tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, loss=loss, samples=2, lora_rank=rank)
    final = Trainer(tiny_model, pairs, held_out, tmp_path / "run", settings).run()
    losses = [float(row["held_out_loss"]) for row in metrics(tmp_path / "run") if row["held_out_loss"]]
    assert len(losses) == 4  # every half epoch
    assert losses[-1] < losses[0]
    base, tuned = load_file(tiny_model / "model.safetensors"), load_file(final / "model.safetensors")
    assert base.keys() == tuned.keys()
    assert not torch.equal(
        base["model.layers.0.mlp.up_proj.weight"], tuned["model.layers.0.mlp.up_proj.weight"]
    )
    assert json.loads((final / "tokenizer_config.json").read_text())
    left = {"metrics.csv", "model", "settings.json", "tensorboard"} | ({"adapter"} if rank else set())
    assert {path.name for path in (tmp_path / "run").iterdir()} == left


def test_right_answers_alone_can_be_learnt(
    tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path: Path
) -> None:
    right = replace(SETTINGS, loss="ce", hard_negatives=False, gamma_plus=1.0, epochs=1)
    Trainer(tiny_model, pairs, held_out, tmp_path / "run", right).run()
    losses = [float(row["held_out_loss"]) for row in metrics(tmp_path / "run") if row["held_out_loss"]]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="from right and wrong"):
        replace(right, loss="sdm")


def test_a_student_nears_its_teacher(
    tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path: Path
) -> None:
    ce = replace(SETTINGS, loss="ce", hard_negatives=False)
    teacher = Trainer(tiny_model, pairs, held_out, tmp_path / "teacher", ce).run()
    first = replace(ce, loss="first")
    Trainer(tiny_model, pairs, held_out, tmp_path / "student", first, teacher).run()
    losses = [float(row["held_out_loss"]) for row in metrics(tmp_path / "student") if row["held_out_loss"]]
    assert losses[-1] < losses[0]
    with pytest.raises(FinetuneError, match="teacher"):
        Trainer(tiny_model, pairs, held_out, tmp_path / "none", first)


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was not stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    trainer = Trainer(tiny_model, pairs, held_out, out, SETTINGS)
    trainer.run()
    assert trainer.train.negatives.current  # hard negatives had a part in it
    return out


@pytest.mark.parametrize("stop", [1, 7])
def test_a_stopped_run_ends_as_one_that_was_not(
    stop: int, whole: Path, tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path: Path
) -> None:
    """Stopped before any checkpoint, and after hard negatives were made."""
    stopped = Trainer(tiny_model, pairs, held_out, tmp_path / "stopped", SETTINGS)
    run_until(stopped, stop)
    with pytest.raises(FinetuneError, match="--resume"):
        Trainer(tiny_model, pairs, held_out, tmp_path / "stopped", SETTINGS).run()
    other = replace(SETTINGS, seed=1)
    with pytest.raises(FinetuneError, match="other settings"):
        Trainer(tiny_model, pairs, held_out, tmp_path / "stopped", other).run(resume=True)
    Trainer(tiny_model, pairs, held_out, tmp_path / "stopped", SETTINGS).run(resume=True)

    assert metrics(tmp_path / "stopped") == metrics(whole)
    again = load_file(tmp_path / "stopped" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, again[name]), name


def test_nothing_to_resume_is_said(
    tiny_model: Path, pairs: list[Pair], held_out: list[Pair], tmp_path: Path
) -> None:
    with pytest.raises(FinetuneError, match="no run to resume"):
        Trainer(tiny_model, pairs, held_out, tmp_path / "none", SETTINGS).run(resume=True)


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import make_pairs
from test_trainer import SETTINGS
from candor.finetune.trainer import Trainer
Trainer(Path(sys.argv[2]), make_pairs("train", 32), make_pairs("held out", 16), Path(sys.argv[3]), SETTINGS).run()
"""


def test_two_processes_learn_what_one_does(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    """At the same global batch; sums over a batch come in another order, hence the tolerance."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
            *(str(root / "finetune/configs/cpu-processes.yaml"), str(tmp_path / "script.py")),
            *(str(Path(__file__).parent), str(tiny_model), str(tmp_path / "two")),
        ],
        cwd=root,
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    one, two = metrics(whole), metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for name in ("loss", "held_out_loss"):
        ours = [float(row[name]) for row in one if row[name]]
        assert ours == pytest.approx([float(row[name]) for row in two if row[name]], rel=1e-3)
