"""Fine-tuning a model to know whether its answers are right, and to answer as it did: a LoRA probe.

    answers    the model's own, labelled                                             finetune.own_answers
    verdict    f = w . h + v . e + b, the log-odds that an answer is right; h: the final state at its verification
               tag, e: the six numbers of its token probabilities (engine.evidence) by the model before
    loss       mean over answers of log(1 + exp(-f)) for right ones, log(1 + exp(f)) for wrong ones
               + mean over tokens of KL(before || after), so that it answers as it did
    half epoch the first term on held-out answers; the model with the lowest is kept.

Adapter and head are trained together, from regressions on the model before. With e in the verdict, the state learns
what the token probabilities do not say. The head is not kept: calibration reads states by itself. Probes with an
adapter that a divergence holds in place are those of arXiv 2509.03531; the state at the tag is that of 2510.26183.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from candor.calibration.answering import DataFile
from candor.calibration.evaluate import auroc
from candor.calibration.intervals import bootstrap
from candor.calibration.logistic import Chosen, fit_chosen, fit_standardised
from candor.calibration.rule import REACHES
from candor.calibration.splits import split
from candor.engine.base import EVIDENCE
from candor.engine.evidence import features
from candor.engine.prompt import ChatFormat
from candor.engine.slot_evidence import surprisal_and_margin
from candor.finetune import passes
from candor.finetune.batches import Batch, collate
from candor.finetune.documents import TAG, encoded
from candor.finetune.errors import FinetuneError
from candor.finetune.model import load_model
from candor.finetune.own_answers import AnswerSet, answered
from candor.finetune.settings import FinetuneSettings
from candor.finetune.training import Training
from candor.sdm.adaptor import Block

DEPTH = 1 / 3
"""The adapter's share of the layers, from the last."""
BEGINNING = 0.3, 10.0
"""Reaches of the regressions on state and on evidence that the head begins at. One on a state that fits these answers
would leave the adapter nothing to learn."""
FOLDS = (0.2,) * 5


class Probe(nn.Module):
    """The adapted model and its head, as one module that accelerate can wrap."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        width = model.config.get_text_config().hidden_size + len(EVIDENCE)
        self.head = nn.Linear(width, 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(
        self, batch: Batch, with_logits: bool = True, adapted: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Log-probabilities (T, V) at what predicts an answer's or a tag's token, or None; states (B, H) at the tags.
        Both float32. adapted: False gives those of the model before."""
        with nullcontext() if adapted else self.model.disable_adapter():
            states = self.model.get_decoder()(
                input_ids=batch.ids, attention_mask=batch.attention, use_cache=False
            )[0]  # (B, L, H)
        h = states[torch.arange(len(batch.tag), device=states.device), batch.tag].float()
        if not with_logits:
            return None, h
        logits = self.model.get_output_embeddings()(states.flatten(0, 1)[batch.predicting])
        return logits.float().log_softmax(1), h

    def verdict(self, h: Tensor, e: Tensor) -> Tensor:
        """h (B, H), e (B, 6) -> f (B,)."""
        return self.head((torch.cat([h, e], 1) - self.mean) / self.scale).squeeze(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def begin(self, h: Tensor, e: Tensor, right: Tensor) -> None:
        """Sets the head to regressions on frozen states h (n, H) and evidence e (n, 6) of answers that are right or
        not, (n,)."""
        size, spread = h.shape[1], h.var(0).mean().sqrt()
        self.mean.copy_(torch.cat([h, e], 1).mean(0))
        self.scale.copy_(torch.cat([spread.expand(size), e.std(0).clamp(min=1e-6)]))
        ((w, _),) = fit_standardised(h, right.long(), [(size, "scalar")], BEGINNING[:1])
        ((v, c),) = fit_standardised(e, right.long(), [(len(EVIDENCE), "feature")], BEGINNING[1:])
        self.head.weight.copy_((torch.cat([w, v]).to(self.scale) * self.scale).unsqueeze(0))
        self.head.bias.fill_(float(c + v @ e.double().mean(0)))


@dataclass(frozen=True)
class Known:
    """ROC AUC on held-out answers of the verdict beside their token probabilities, before and after, and the 95 %
    interval of the difference. Before: of a regression on the frozen states of the same answers."""

    before: float
    after: float
    gain: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.gain
        said = (
            f"ROC AUC of state and token probabilities on held-out prompts: {self.before:.3f} before, "
            f"{self.after:.3f} after, a gain of {self.after - self.before:.3f} [{low:.3f}, {high:.3f}]."
        )
        if low > 0:
            return said
        return f"{said} No gain is shown: calibrate the model as it was, with these labels among its records."


class ProbeTraining(Training):
    """One run on records. train, held_out: their prompts differ. `known` is there after `run`."""

    known: Known

    def __init__(
        self, model: Path, train: DataFile, held_out: DataFile, out: Path, settings: FinetuneSettings
    ) -> None:
        """Raises FinetuneError for a record that would not be served so."""
        if settings.lora_rank == 0:
            raise FinetuneError('loss "probe" trains an adapter: give a --lora-rank above 0')
        chat = ChatFormat.from_directory(model)
        self._closing, _ = chat.closing(TAG)
        self._files = {"train": train, "held-out": held_out}
        self._prompts = {
            name: encoded(file.records, chat, settings.system_prompt, "record")
            for name, file in self._files.items()
        }
        # A layer is compiled for one kind of input, and only those above the first adapted one need a gradient.
        adapted = load_model(model, replace(settings, compile=False), DEPTH)
        super().__init__(model, out, settings, chat, Probe(adapted))

    @property
    def _probe(self) -> Probe:
        return self.accelerator.unwrap_model(self.scorer)  # type: ignore[no-any-return]

    def run(self, resume: bool = False) -> Path:
        final = super().run(resume)
        self.known = self._known()
        return final

    def _lengths(self) -> list[int]:
        self.train, self.held_out = (self._labelled(name) for name in self._files)
        return [len(document.ids) for document in self.train.documents]

    def _labelled(self, name: str) -> AnswerSet:
        settings, file, prompts = self.settings, self._files[name], self._prompts[name]

        def sample(seed: int, some: list[Sequence[int]]) -> list[list[str]]:
            torch.manual_seed(settings.seed + seed)
            return self._answers(some, settings.samples)

        path = self.directory.path / f"{name}.jsonl"
        found = answered(self.accelerator, file.records, prompts, sample, path)
        return AnswerSet.of(found, file, prompts, self.chat, settings.max_tokens)

    def _prepare(self) -> None:
        train = len(self.train.documents)
        every = (*self.train.documents, *self.held_out.documents)
        found = passes.rows(self.accelerator, self._frozen, every, self.settings.micro_batch)
        h, e = found[:, : -len(EVIDENCE)], found[:, -len(EVIDENCE) :]
        self._probe.begin(h[:train], e[:train], torch.tensor(self.train.right))
        self.progress.evidence = e
        frozen = self._regression(h[:train])
        before = (h[train:].double() @ frozen.w + frozen.b).float()
        self.progress.verdicts = torch.stack([before, before])

    def _regression(self, h: Tensor) -> Chosen:
        """On the states before of the answers to learn from (n, H), with the penalty that suits them best."""
        right = torch.tensor(self.train.right).long()
        folds = split(self.train.prompt, right.tolist(), FOLDS, self.settings.seed)
        return fit_chosen(h.double(), right, [(h.shape[1], "scalar")], folds, REACHES)

    def _frozen(self, batch: Batch) -> Tensor:
        """[h ; e] (B, H + 6) of the model before; e is of the answer's tokens without its tag's, as it is served."""
        log_p, h = self.scorer(batch, adapted=False)
        measured = surprisal_and_margin(log_p, batch.targets)
        e = []
        for row in range(len(h)):
            own = measured[batch.document == row][: -len(self._closing)]
            e.append(features(EVIDENCE, own[:, 0].tolist(), own[:, 1].tolist()))
        return torch.cat([h, torch.stack(e).to(h)], 1)

    def _verdict(self, h: Tensor, e: Tensor) -> Tensor:
        device = self.accelerator.device
        return self._probe.verdict(h.to(device), e.to(device))

    def _losses(self, numbers: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, bool]]:
        side, device = self.train, self.accelerator.device
        times = sum(side.times[i] for i in numbers)
        tokens = sum(len(side.documents[i].ids) - side.documents[i].learnt for i in numbers)
        for share, counts in self._shares(numbers):
            batch = collate([side.documents[i] for i in share]).to(device)
            right, given = (
                torch.tensor([float(of[i]) for i in share], device=device) for of in (side.right, side.times)
            )
            with torch.no_grad():
                before, _ = self.scorer(batch, adapted=False)
            after, h = self.scorer(batch)
            f = self._verdict(h, self.progress.evidence[share])
            verdict = F.binary_cross_entropy_with_logits(f, right, given, reduction="sum")
            held = F.kl_div(after, before, log_target=True, reduction="sum")
            yield verdict / times + held / tokens, counts

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        side = self.held_out
        h = passes.states(self.accelerator, self.scorer, side.documents, self.settings.micro_batch)
        f = self._latest = self._verdict(h, self.progress.evidence[-len(h) :]).cpu()
        right, times = (torch.tensor(of, dtype=torch.float32) for of in (side.right, side.times))
        loss = F.binary_cross_entropy_with_logits(f, right, times, reduction="sum") / times.sum()
        return {"held_out_loss": float(loss), "held_out_auroc": auroc(f, right)}

    def _keep(self) -> None:
        super()._keep()
        self.progress.verdicts[1] = self._latest

    def _known(self) -> Known:
        side, right = self.held_out, torch.tensor(self.held_out.right).long()
        folds = split(side.prompt, right.tolist(), FOLDS, self.settings.seed)
        e = self.progress.evidence[-len(right) :]
        blocks: list[Block] = [(1, "feature"), (len(EVIDENCE), "feature")]
        before, after = (
            fit_chosen(torch.cat([f.unsqueeze(1), e], 1).double(), right, blocks, folds, REACHES).out_of_fold
            for f in self.progress.verdicts
        )
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(side.prompt):
            rows.setdefault(prompt, []).append(row)
        groups = list(rows.values())

        def gain(drawn: Tensor) -> float:
            at = [row for group in drawn.tolist() for row in groups[group]]
            return auroc(after[at], right[at]) - auroc(before[at], right[at])

        interval = bootstrap(gain, len(groups), self.settings.seed)
        return Known(auroc(before, right), auroc(after, right), interval)
