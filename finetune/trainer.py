"""Fine-tuning a language model into an SDM language model (arXiv 2510.26183, section 4).

epoch      states of all training documents -> an SDM layer, then fixed           finetune.supervision
step       documents drawn as right or wrong, wrong ones static or generated      finetune.negatives
           one forward pass: logits at learnt positions and h                     finetune.forward
           h -> SDM(z')_r -> the base of each document's loss                     finetune.objectives
half epoch loss on held-out documents with their own SDM layer; the model with the lowest loss is kept.
           Once hard negatives are used, only evaluations with hard negatives are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candor.engine.prompt import ChatFormat
from candor.finetune import objectives, passes
from candor.finetune.batches import Batch, collate
from candor.finetune.data import Pair
from candor.finetune.documents import Documents
from candor.finetune.errors import FinetuneError
from candor.finetune.forward import LearntPositions
from candor.finetune.model import load_model
from candor.finetune.negatives import Negatives
from candor.finetune.settings import FinetuneSettings
from candor.finetune.supervision import Supervision
from candor.finetune.teacher import TopTokens, choose_c
from candor.finetune.training import Training
from candor.finetune.uncertainty import failure_rates, smoothing

REPORTED_ALPHA = 0.9


class Trainer(Training):
    """One run on pairs. `run` trains and returns the folder of the merged model in `out` (finetune.run_directory)."""

    def __init__(
        self,
        model: Path,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        out: Path,
        settings: FinetuneSettings,
        teacher: Path | None = None,
    ) -> None:
        if (settings.loss == "first") != (teacher is not None):
            raise FinetuneError('a teacher goes with loss "first", and "first" with a teacher')
        chat = ChatFormat.from_directory(model)
        self.train = Documents("train", chat, train, settings)
        self.held_out = Documents("held out", chat, held_out, settings)
        super().__init__(model, out, settings, chat, LearntPositions(load_model(model, settings)))
        self._teacher = self._load_teacher(teacher) if teacher else None
        self.progress.smoothing = torch.zeros(len(train))

    def _lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.train.prompts]

    def _prepare(self) -> None:
        """Computes what "ual" and "first" need before the first step."""
        if self.settings.loss == "ual":
            torch.manual_seed(self.settings.seed)
            sampled = self._answers(self.train.prompts, self.settings.samples)
            self.progress.smoothing = smoothing(failure_rates(self.train.pairs, sampled))
        if self._teacher is not None:
            right = [self.held_out.right(number) for number in range(len(self.held_out))]
            size = self.settings.micro_batch
            self.progress.c = choose_c(
                (self._top_tokens(batch), batch.targets.cpu())
                for batch in (collate(right[i : i + size]) for i in range(0, len(right), size))
            )

    def _begin_epoch(self, epoch: int) -> None:
        self.train.negatives.begin_epoch()
        if epoch == self.settings.generate_from and self.settings.hard_negatives:
            self._harden_held_out()
        if self.settings.loss == "sdm":
            examples, r = self.train.examples("layer", epoch)
            h = passes.states(self.accelerator, self.scorer, examples, self.settings.micro_batch)
            self.progress.supervision = Supervision.train(
                h, r, self.settings.layer, seed=1000 * epoch + self.settings.seed
            )

    def _ahead(self, epoch: int, numbers: Sequence[int]) -> None:
        self._harden(self.train, self.train.negatives.to_generate("step", epoch, numbers))

    def _harden(self, side: Documents, numbers: Sequence[int]) -> None:
        """Offers the model's own answers to these documents as negatives."""
        texts = self._answers([side.prompts[number] for number in numbers])
        side.negatives.offer(numbers, [text for (text,) in texts])

    def _losses(self, numbers: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, bool]]:
        """The mean loss over all targets of the step."""
        shown = {number: self.train.example("step", epoch, number) for number in numbers}
        targets = sum(len(example.ids) - example.learnt for example, _ in shown.values())
        for share, counts in self._shares(numbers):
            batch = collate([shown[number][0] for number in share])
            r = torch.tensor([shown[number][1] for number in share])
            own = self.progress.supervision
            yield self._of_targets(batch, self.train, torch.tensor(share), r, own).sum() / targets, counts

    def _of_targets(
        self, batch: Batch, side: Documents, numbers: Tensor, r: Tensor, supervision: Supervision | None
    ) -> Tensor:
        """Losses (T,) of the batch's targets. numbers, r: (B,), document numbers and whether right."""
        batch = batch.to(self.accelerator.device)
        logits, h = self.scorer(batch)
        match self.settings.loss:
            case "sdm":
                assert supervision is not None
                value = supervision.sdm_at(h.cpu(), numbers, r).to(logits.device)
                return objectives.sdm_loss(logits, batch.targets, value[batch.document])
            case "ual" if side is self.train:
                e = self.progress.smoothing[numbers].to(logits.device)
                return objectives.smoothed_cross_entropy(logits, batch.targets, e[batch.document])
            case "first":
                top = self._top_tokens(batch)
                return objectives.distillation(logits, top.ids, top.recalibrated(self.progress.c))
        return objectives.cross_entropy(logits, batch.targets)

    def _harden_held_out(self) -> None:
        """Adds wrong answers of the current model to the held-out documents, once. Only the evaluations after this
        are compared; they differ only by the model."""
        negatives = self.held_out.negatives
        wrong = [n for n in range(len(negatives.pairs)) if not negatives.is_positive("evaluation", 0, n)]
        self._harden(self.held_out, wrong)
        self.progress.best = None

    def _evaluate(self) -> dict[str, float]:
        """Computes the held-out loss and, if both kinds are shown, the share that the held-out SDM layer admits.

        The draws are always those of epoch 0, so that losses differ only by the model.
        """
        side, settings = self.held_out, self.settings
        examples, r = side.examples("evaluation", 0)
        h = passes.states(self.accelerator, self.scorer, examples, settings.micro_batch)
        both = 0 < int(r.sum()) < len(r)
        own = Supervision.train(h, r, settings.layer, seed=settings.seed) if both else None
        total = torch.zeros((), dtype=torch.float64)
        targets = sum(len(example.ids) - example.learnt for example in examples)
        for share, counts in self._shares(range(len(examples))):
            numbers = torch.tensor(share)
            batch = collate([examples[i] for i in share])
            with torch.no_grad():
                losses = self._of_targets(batch, side, numbers, r[numbers], own)
            total += counts * losses.double().sum().cpu()
        loss = float(self.accelerator.reduce(total.to(self.accelerator.device), "sum")) / targets
        values = {"held_out_loss": loss}
        if own is not None:
            estimator = own.estimator.with_regions([REPORTED_ALPHA])
            admitted = estimator.estimate(h[own.row < 0], REPORTED_ALPHA).admitted.float().mean()
            values["admitted"] = float(admitted)
        return values

    def _negatives(self) -> Sequence[Negatives]:
        return self.train.negatives, self.held_out.negatives

    def _load_teacher(self, directory: Path) -> Any:
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=torch.bfloat16 if self.settings.bf16 else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
        return LearntPositions(teacher.eval().to(self.accelerator.device))

    @torch.no_grad()
    def _top_tokens(self, batch: Batch) -> TopTokens:
        assert self._teacher is not None
        return TopTokens.of(self._teacher(batch.to(self.accelerator.device))[0])
