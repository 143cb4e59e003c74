"""The loop of every run: epochs of steps, and between them measurements, evaluations and checkpoints.

accelerate runs it on one CPU, one GPU or several (docs/finetuning.md). Every draw depends only on seed, epoch and
document, and the learning rate only on the step. So a run that was stopped and resumed ends like one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from candor.engine.prompt import ChatFormat
from candor.finetune import passes
from candor.finetune.batches import shuffled_batches
from candor.finetune.documents import TAG
from candor.finetune.errors import FinetuneError
from candor.finetune.generation import generate
from candor.finetune.negatives import Negatives, draw
from candor.finetune.run_directory import Progress, RunDirectory
from candor.finetune.settings import FinetuneSettings

LOG_EVERY = 10


class Training:
    """One run of `base` in `out`. scorer: a module on which losses are computed; its `model` is the language one."""

    def __init__(
        self, base: Path, out: Path, settings: FinetuneSettings, chat: ChatFormat, scorer: nn.Module
    ) -> None:
        from accelerate import Accelerator

        self.base, self.settings, self.chat = base, settings, chat
        self.accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
        self.directory = RunDirectory(out, self.accelerator)
        self._parameters = [p for p in scorer.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.scorer, self.optimiser = self.accelerator.prepare(scorer, optimiser)
        self.progress = Progress()

    def _lengths(self) -> list[int]:
        """Of the documents to learn from, each about so many tokens. Called once, when the run's folder is open."""
        raise NotImplementedError

    def _losses(self, numbers: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, bool]]:
        """Yields a loss for each forward pass of this process over its share of the documents `numbers`, and whether
        it counts; together, over all processes, they sum to the step's."""
        raise NotImplementedError

    def _evaluate(self) -> dict[str, float]:
        """Measures the model on held-out documents. "held_out_loss" chooses among models."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """What is computed before the first step."""

    def _begin_epoch(self, epoch: int) -> None: ...

    def _ahead(self, epoch: int, numbers: Sequence[int]) -> None:
        """Called with the documents of the next `generate_ahead` steps."""

    def _negatives(self) -> Sequence[Negatives]:
        """What is kept with a checkpoint besides model, optimiser and progress."""
        return ()

    def run(self, resume: bool = False) -> Path:
        """Trains, and returns the folder of the merged model. Raises FinetuneError if `out` holds another run, or
        none to resume."""
        progress, settings = self.progress, self.settings
        self.directory.open(settings, resume)
        lengths = self._lengths()
        self._steps_per_epoch = -(-len(lengths) // settings.batch_size)
        self._steps = settings.epochs * self._steps_per_epoch
        evaluated = {
            round((i + 1) * self._steps_per_epoch / settings.evaluations) + epoch * self._steps_per_epoch
            for epoch in range(settings.epochs)
            for i in range(settings.evaluations)
        }
        if resume:
            self.directory.load(progress, self._negatives())
        bar = tqdm(
            total=self._steps,
            initial=progress.step,
            desc="fine-tuning",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        if progress.step == 0:
            self._prepare()
        for epoch in range(progress.step // self._steps_per_epoch, settings.epochs):
            batches = shuffled_batches(lengths, settings.batch_size, draw(settings.seed, "order", epoch))
            for within in range(progress.step - epoch * self._steps_per_epoch, len(batches)):
                if within == 0:
                    self._begin_epoch(epoch)
                if within % settings.generate_ahead == 0:
                    ahead = batches[within : within + settings.generate_ahead]
                    self._ahead(epoch, [number for batch in ahead for number in batch])
                loss = self._step(epoch, batches[within])
                progress.step += 1
                if progress.step % LOG_EVERY == 0 or progress.step == self._steps:
                    self._log({"loss": loss, "learning_rate": self._learning_rate(progress.step - 1)})
                if progress.step in evaluated:
                    self._choose()
                if (within + 1) % settings.checkpoint_every == 0 or within + 1 == len(batches):
                    self.directory.save(progress, self._negatives())
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
        return self.directory.finish(self.base, bool(settings.lora_rank))

    def _step(self, epoch: int, numbers: Sequence[int]) -> float:
        """Makes one update from the documents `numbers`; returns their loss."""
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for loss, counts in self._losses(numbers, epoch):
            loss = loss if counts else 0 * loss
            accelerator.backward(loss * accelerator.num_processes)  # processes' gradients are averaged
            total += loss.detach()
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(self.progress.step)
        accelerator.clip_grad_norm_(self._parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        found = float(accelerator.reduce(total, "sum"))
        if found != found:
            raise FinetuneError(
                f"the loss of step {self.progress.step} isn't finite: lower the learning rate"
            )
        return found

    def _choose(self) -> None:
        """Keeps the model if none before had a lower held-out loss."""
        values = self._evaluate()
        self._log(values)
        loss = values["held_out_loss"]
        if self.progress.best is None or loss < self.progress.best:
            self.progress.best = loss
            self._keep()

    def _keep(self) -> None:
        self.directory.keep_best(self.scorer)

    def _shares(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """This process's forward passes over the documents `numbers`, and whether each counts."""
        accelerator = self.accelerator
        return passes.spread(
            numbers, self.settings.micro_batch, accelerator.process_index, accelerator.num_processes
        )

    def _answers(self, prompts: Sequence[Sequence[int]], samples: int = 0) -> list[list[str]]:
        """Of the model as it is, as `generate` writes them; each process writes some of them."""
        lm, most = self.accelerator.unwrap_model(self.scorer).model, self.settings.max_tokens
        return passes.answers(
            self.accelerator,
            prompts,
            lambda mine: generate(lm, self.chat, mine, TAG, most, samples=samples),
        )

    def _log(self, values: dict[str, float]) -> None:
        step = self.progress.step
        self.progress.history.append({"step": step, "epoch": step / self._steps_per_epoch} | values)
        self.directory.log(self.progress.history, values, step)

    def _learning_rate(self, step: int) -> float:
        warmup = max(1, round(self.settings.warmup * self._steps))
        rising, falling = (step + 1) / warmup, (self._steps - step) / max(1, self._steps - warmup)
        return self.settings.learning_rate * min(1.0, rising, falling)
