"""The files of a run on disk, so that it can be stopped at any time.

settings.json             the run's settings; it resumes only with the same ones
train, held-out, .jsonl   the model's own answers with their labels, with loss "probe"
metrics.csv, tensorboard/ measurements during the run
best/                     the best model so far
checkpoint/               model, optimiser and `Progress`, always complete; removed when the run is done
model/, adapter/          the best model, merged, ready to be served, and its adapter (with LoRA)
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candor.finetune.errors import FinetuneError
from candor.finetune.merge import merge, replace_directory
from candor.finetune.negatives import Negatives
from candor.finetune.settings import FinetuneSettings
from candor.finetune.supervision import Supervision


@dataclass
class Progress:
    """The state of a run besides its model and optimiser.

    step: steps done. supervision: the epoch's layer. best: lowest held-out loss. history: rows of metrics.csv.
    smoothing: (n,), per document, with loss "ual". c: the teacher's recalibration, with "first".
    With "probe": evidence (n, 6), of the answers to learn from and then of those held out; verdicts (2, m), on those
    held out, of the model before and of the best.
    """

    step: int = 0
    supervision: Supervision | None = None
    best: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    smoothing: Tensor = field(default_factory=lambda: torch.zeros(0))
    c: float = 1.0
    evidence: Tensor = field(default_factory=lambda: torch.zeros(0))
    verdicts: Tensor = field(default_factory=lambda: torch.zeros(2, 0))

    def state(self) -> dict[str, Any]:
        supervision = None if self.supervision is None else self.supervision.state()
        return vars(self) | {"supervision": supervision}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["supervision"] is not None:
            self.supervision = Supervision.from_state(state["supervision"])


class RunDirectory:
    """Reads and writes the files. Only the main process writes; the others wait for it."""

    def __init__(self, path: Path, accelerator: Any) -> None:
        self.path, self._accelerator = path, accelerator

    def open(self, settings: FinetuneSettings, resume: bool) -> None:
        """Raises FinetuneError if the directory holds another run, or none to resume."""
        told = self.path / "settings.json"
        text = json.dumps(settings.to_json(), indent=2) + "\n"
        if resume:
            if not told.exists():
                raise FinetuneError(f"{self.path} holds no run to resume; leave out --resume to begin one")
            if told.read_text(encoding="utf-8") != text:
                raise FinetuneError(f"{told} has other settings: give those to resume, or another --out")
        elif self.path.exists() and any(self.path.iterdir()):
            raise FinetuneError(f"{self.path} is not empty: give --resume to go on, or another --out")
        self._accelerator.wait_for_everyone()
        self.path.mkdir(parents=True, exist_ok=True)
        told.write_text(text, encoding="utf-8")

    def log(self, history: Sequence[dict[str, float]], values: dict[str, float], step: int) -> None:
        """Writes metrics. history: all rows so far; `values` are in its last row."""
        if not self._accelerator.is_main_process:
            return
        names = list(dict.fromkeys(name for row in history for name in row))
        with (self.path / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(history)
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.path / "tensorboard"), purge_step=step) as board:
            for name, value in values.items():
                board.add_scalar(name, value, step)

    def keep_best(self, scorer: Any) -> None:
        """Saves the model as the best so far. scorer: the wrapped `LearntPositions`."""
        state = self._accelerator.get_state_dict(scorer)
        own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        model = self._accelerator.unwrap_model(scorer).model
        if self._accelerator.is_main_process:
            replace_directory(
                self.path / "best", lambda path: model.save_pretrained(str(path), state_dict=own)
            )
        self._accelerator.wait_for_everyone()

    def save(self, progress: Progress, negatives: Sequence[Negatives]) -> None:
        """Writes a checkpoint and then replaces the last one, so that an unfinished one is never used."""
        unfinished, checkpoint = self.path / "checkpoint.unfinished", self.path / "checkpoint"
        self._accelerator.save_state(str(unfinished))
        if self._accelerator.is_main_process:
            state = progress.state() | {"negatives": [(side.current, side.last) for side in negatives]}
            torch.save(state, unfinished / "run.pt")
            shutil.rmtree(checkpoint, ignore_errors=True)
            unfinished.rename(checkpoint)
        self._accelerator.wait_for_everyone()

    def load(self, progress: Progress, negatives: Sequence[Negatives]) -> None:
        """Loads the checkpoint. A run stopped before its first one begins anew."""
        checkpoint = self.path / "checkpoint"
        if not checkpoint.exists():
            return
        self._accelerator.load_state(str(checkpoint))
        state = torch.load(checkpoint / "run.pt", weights_only=True)
        for side, (current, last) in zip(negatives, state.pop("negatives"), strict=True):
            side.current, side.last = current, last
        progress.restore(state)

    def finish(self, base: Path, lora: bool) -> Path:
        """Writes the best model as `model/` and, with LoRA, its adapter as `adapter/`."""
        final, best = self.path / "model", self.path / "best"
        if self._accelerator.is_main_process:
            if lora:
                replace_directory(final, lambda path: merge(base, best, path))
                shutil.rmtree(self.path / "adapter", ignore_errors=True)
                best.rename(self.path / "adapter")
            else:
                replace_directory(final, lambda path: _whole(base, best, path))
                shutil.rmtree(best)
            shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
        self._accelerator.wait_for_everyone()
        return final


def _whole(base: Path, best: Path, out: Path) -> None:
    """Writes the best weights with the base's tokenizer, if every parameter was trained."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(best, out, dirs_exist_ok=True)
