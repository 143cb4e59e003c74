"""The LoRA probe: what it learns from, what it measures, and runs that are stopped or spread over processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from candor.app.cli import cli
from candor.calibration.answering import DataFile
from candor.calibration.evaluate import auroc
from candor.engine.prompt import ChatFormat
from candor.finetune.batches import collate
from candor.finetune.errors import FinetuneError
from candor.finetune.examples import Example
from candor.finetune.own_answers import AnswerSet, OwnAnswer
from candor.finetune.probe import Known, Probe, ProbeTraining
from candor.finetune.settings import FinetuneSettings
from tests.finetune.conftest import run_until
from tests.finetune.test_commands import RUNNER
from tests.finetune.test_trainer import metrics

pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate, peft and tensorboard warn of themselves

SETTINGS = FinetuneSettings(
    loss="probe",
    epochs=2,
    batch_size=8,
    micro_batch=8,
    learning_rate=1e-2,
    lora_rank=4,
    samples=3,
    max_tokens=4,
    generate_ahead=2,
    checkpoint_every=2,
    bf16=False,
)
WORDS = " yes", " no", " one"


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, which writes one of `WORDS` or the end of its turn after every token."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    out = tmp_path_factory.mktemp("models") / "answers"
    shutil.copytree(tiny_model, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data += 0.1  # all states have a direction in common
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    for word in (*WORDS, "<|im_end|>"):
        (token,) = tokenizer.encode(word)
        model.lm_head.weight.data[token] = 14 / model.config.hidden_size
    model.save_pretrained(out)
    return out


def file_of(path: Path, name: str, count: int) -> DataFile:
    rows = [
        {"id": f"{name}-{i}", "prompt": f"Say {name} {i}.", "reference": "^(no|one)", "verifier": "regex"}
        for i in range(count)
    ]
    path.mkdir(exist_ok=True)
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFile.load(path / f"{name}.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataFile, DataFile]:
    folder = tmp_path_factory.mktemp("records")
    return file_of(folder, "train", 24), file_of(folder, "held", 24)


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, files: tuple[DataFile, DataFile], tmp_path_factory: pytest.TempPathFactory
) -> ProbeTraining:
    """A run that was not stopped."""
    training = ProbeTraining(tiny_model, *files, tmp_path_factory.mktemp("runs") / "whole", SETTINGS)
    training.run()
    return training


def test_it_changes_the_last_layers_alone_and_says_what_it_brought(
    whole: ProbeTraining, tiny_model: Path
) -> None:
    out = whole.directory.path
    before, after = load_file(tiny_model / "model.safetensors"), load_file(out / "model/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)
    side, last = whole.held_out, whole.progress.verdicts[1]
    right = torch.tensor(side.right)
    assert 0 <= whole.known.before <= 1
    assert 0.5 < whole.known.after <= 1
    best = min(row["held_out_loss"] for row in whole.progress.history if "held_out_loss" in row)
    loss = F.binary_cross_entropy_with_logits(
        last, right.float(), torch.tensor(side.times).float(), reduction="sum"
    )
    assert float(loss) / sum(side.times) == pytest.approx(best)


def test_a_gain_that_is_not_shown_is_said() -> None:
    assert "No gain is shown" in str(Known(0.8, 0.81, (-0.01, 0.03)))
    assert "No gain is shown" not in str(Known(0.8, 0.9, (0.06, 0.13)))


def test_what_it_learns_from_is_kept_and_counted(whole: ProbeTraining) -> None:
    lines = (whole.directory.path / "train.jsonl").read_text().splitlines()
    kept = [OwnAnswer(**json.loads(line)) for line in lines]
    assert sum(one.times for one in kept) == 24 * 3
    assert len({(one.id, one.response) for one in kept}) == len(kept)
    assert all(one.label is one.response.startswith(("no", "one")) for one in kept)
    assert 0 < len(whole.train.documents) < len(kept)  # without those that the limit cut


@pytest.mark.parametrize("step", [0, 3])
def test_a_stopped_run_ends_as_one_that_was_not(
    step: int,
    whole: ProbeTraining,
    tiny_model: Path,
    files: tuple[DataFile, DataFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped amid the answers, and between two checkpoints."""
    stopped = ProbeTraining(tiny_model, *files, tmp_path / "run", SETTINGS)
    monkeypatch.setattr("candor.finetune.own_answers.AT_ONCE", 24 if step else 10)
    run_until(stopped, step)
    if not step:  # as if the second half of the answers had never come
        lines = (tmp_path / "run/train.jsonl").read_text().splitlines(keepends=True)
        cut = [line for line in lines if int(json.loads(line)["id"].split("-")[1]) < 10]
        (tmp_path / "run/train.jsonl").write_text("".join(cut))
    resumed = ProbeTraining(tiny_model, *files, tmp_path / "run", SETTINGS)
    final = resumed.run(resume=True)
    if step:
        told = load_file(whole.directory.path / "model/model.safetensors")
        assert all(
            torch.equal(tensor, told[name]) for name, tensor in load_file(final / "model.safetensors").items()
        )
        assert resumed.known == whole.known
    else:
        assert (tmp_path / "run/train.jsonl").read_text() == "".join(lines)


def test_other_records_are_not_resumed_with(
    tiny_model: Path, files: tuple[DataFile, DataFile], whole: ProbeTraining, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text((whole.directory.path / "settings.json").read_text())
    (out / "train.jsonl").write_text((whole.directory.path / "train.jsonl").read_text())
    others = file_of(tmp_path, "other", 4)
    with pytest.raises(FinetuneError, match="answers to other records"):
        ProbeTraining(tiny_model, others, files[1], out, SETTINGS).run(resume=True)


def given(path: Path, name: str, count: int) -> DataFile:
    """Answers with their labels."""
    rows = [
        {
            "id": f"{i}",
            "prompt": f"Say {name} {i}.",
            "response": f"{i} of more than four words",
            "label": i % 2,
        }
        for i in range(count)
    ]
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFile.load(path / f"{name}.jsonl")


def test_answers_with_labels_are_learnt_from_as_they_are_by_two_processes_as_by_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Up to the order of sums."""
    own, held = given(tmp_path, "given", 20), given(tmp_path, "held", 24)
    one = ProbeTraining(tiny_model, own, held, tmp_path / "one", SETTINGS)
    one.run()
    assert one.train.right == (False, True) * 10
    assert one.train.times == (1,) * 20
    root = Path(__file__).parents[2]
    options = {
        **{"model": tiny_model, "data": own.path, "held-out": held.path, "out": tmp_path / "two"},
        **{"loss": "probe", "epochs": 2, "batch-size": 8, "micro-batch": 4, "learning-rate": 1e-2},
        **{"lora-rank": 4, "samples": 3, "max-tokens": 4},
    }
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        str(root / "finetune/configs/cpu-processes.yaml"),
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launch, "-m", "candor.app.cli", "finetune", "--no-bf16"),
            *(text for name, value in options.items() for text in (f"--{name}", str(value))),
        ],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ROC AUC of state and token probabilities on held-out prompts") == 1
    kept = [(tmp_path / name / "train.jsonl").read_text() for name in ("one", "two")]
    assert kept[0] == kept[1]
    rows = [metrics(tmp_path / name) for name in ("one", "two")]
    for name in ("loss", "held_out_loss"):
        ours, theirs = ([float(row[name]) for row in own if row[name]] for own in rows)
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_cut_answers_and_unknown_ones_are_left_out(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candor.finetune.own_answers.FEWEST", 1)
    chat, file = ChatFormat.from_directory(base_model), file_of(tmp_path, "a", 2)
    answers = [
        OwnAnswer("a-0", "yes", True, 2),
        OwnAnswer("a-0", "no", None, 1),
        OwnAnswer("a-1", "one two three four five", True, 1),
        OwnAnswer("a-1", "no", False, 1),
        OwnAnswer("a-1", "no", False, 3),
    ]
    found = AnswerSet.of(answers, file, [[1, 2], [3]], chat, max_tokens=4)
    assert (found.right, found.times) == ((True, False), (2, 4))
    assert found.prompt == tuple(record.prompt_digest for record in file.records)
    first = found.documents[0]
    assert first.ids[: first.learnt] == (1, 2)
    closing, _ = chat.closing("<verified>")
    assert first.ids[-len(closing) :] == tuple(closing)
    assert first.tag == len(first.ids) - 1
    with pytest.raises(FinetuneError, match="1 of 1 different answers are right"):
        AnswerSet.of(answers[:2], file, [[1, 2], [3]], chat, max_tokens=4)


def test_the_head_begins_at_a_regression_and_the_model_before_is_left_alone(tiny_model: Path) -> None:
    from candor.finetune.model import load_model

    probe = Probe(load_model(tiny_model, replace(SETTINGS, compile=False), 0.5))
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(400) % 2 == 0
    h = torch.randn(400, 32, generator=generator) * 3 + right.unsqueeze(1)
    e = torch.randn(400, 6, generator=generator) * 5 + 7
    e[:, 0] += 8 * right
    probe.begin(h, e, right)
    f = probe.verdict(h, e)
    assert auroc(f, right) > auroc(e[:, 0], right)
    assert abs(float(f.sigmoid().mean()) - 0.5) < 0.05
    batch = collate([Example((5, 6, 7, 8), 2, 3), Example((5, 6, 9), 1, 2)])
    before, state = probe(batch, adapted=False)
    for name, parameter in probe.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    again, same = probe(batch, adapted=False)
    assert torch.equal(before, again)
    assert torch.equal(state, same)
    after, moved = probe(batch)
    assert not torch.allclose(before, after)
    assert not torch.allclose(state, moved)


def test_the_command_names_what_is_wrong(
    tiny_model: Path, files: tuple[DataFile, DataFile], tmp_path: Path
) -> None:
    given = ["finetune", "--model", str(tiny_model), "--out", str(tmp_path / "run"), "--loss", "probe"]
    same = RUNNER.invoke(cli, [*given, "--data", str(files[0].path), "--held-out", str(files[0].path)])
    assert same.exit_code == 1
    assert "same prompt as line 1" in same.output
    whole = [*given, "--data", str(files[0].path), "--held-out", str(files[1].path), "--lora-rank", "0"]
    refused = RUNNER.invoke(cli, whole)
    assert refused.exit_code == 1
    assert "give a --lora-rank above 0" in " ".join(refused.output.split())
    taught = RUNNER.invoke(cli, [*whole[:-2], "--teacher", str(tiny_model)])
    assert taught.exit_code == 1
    assert "a teacher goes with --loss first" in taught.output
