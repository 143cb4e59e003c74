"""Fine-tuning a model to know whether its answers are right, and to say nothing else than before: a LoRA probe.

    answers    the model's own, labelled                                             finetune.own_answers
    verdict    f = w . h + b, the log-odds that an answer is right,
               h the final state at its verification tag
    loss       mean over answers of log(1 + exp(-f)) or log(1 + exp(f))              right, wrong
               + mean over tokens of KL(before || after)                             so that it answers as it did
    half epoch the first term on held-out answers; the model with the lowest is kept.

Adapter and head are trained together, the head from a regression on the states before. The head is not kept:
calibration reads the states by itself. Probes with an adapter that a divergence holds in place are those of
arXiv 2509.03531; the state at the tag is that of 2510.26183.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from candor.calibration.answering import DataFile
from candor.calibration.evaluate import auroc
from candor.calibration.logistic import cross_validated, fit_standardised
from candor.calibration.splits import split
from candor.engine.base import EVIDENCE
from candor.engine.evidence import features
from candor.engine.prompt import ChatFormat
from candor.engine.slot_evidence import surprisal_and_margin
from candor.finetune import passes
from candor.finetune.batches import Batch, collate
from candor.finetune.documents import TAG
from candor.finetune.errors import FinetuneError
from candor.finetune.examples import Example
from candor.finetune.generation import generate
from candor.finetune.model import load_model
from candor.finetune.negatives import draw
from candor.finetune.own_answers import Labelled, answered, prompts_of
from candor.finetune.settings import FinetuneSettings
from candor.finetune.training import Training
from candor.sdm.adaptor import Block

DEPTH = 1 / 3
"""The adapter's share of the layers, from the last."""
REACH = 0.3
"""Of the regression that the head begins at: one that fits these very answers leaves the adapter nothing to learn."""
FIRST_FIT = 2000
"""Answers that it is fitted to, at most."""
FOLDS, EVIDENCE_REACH, REDRAWS = 5, 10.0, 1000


class Probe(nn.Module):
    """The adapted model and its head, as one module that accelerate can wrap."""

    scale: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        self.register_buffer("scale", torch.ones(()))

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

    def verdict(self, h: Tensor) -> Tensor:
        """h (B, H) -> f (B,)."""
        return self.head(h / self.scale).squeeze(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def begin(self, h: Tensor, right: Tensor) -> None:
        """Sets the head to a regression on frozen states h (n, H) of answers that are right or not, (n,)."""
        self.scale.copy_(h.var(0).mean().sqrt())
        ((w, b),) = fit_standardised(h, right.long(), [(h.shape[1], "scalar")], (REACH,))
        self.head.weight.copy_((w * self.scale.double().cpu()).float().unsqueeze(0))
        self.head.bias.fill_(float(b))


@dataclass(frozen=True)
class Known:
    """ROC AUC of a verdict on held-out answers, before and after; `beside`: combined with the answers' own token
    probabilities, by regressions that other prompts fitted. gain: of `beside`, with its 95 % interval."""

    alone: tuple[float, float]
    beside: tuple[float, float]
    gain: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.gain
        said = (
            f"ROC AUC on held-out prompts: of the state {self.alone[0]:.3f} before, {self.alone[1]:.3f} after; "
            f"beside token probabilities {self.beside[0]:.3f} and {self.beside[1]:.3f}, a gain of "
            f"{self.beside[1] - self.beside[0]:.3f} [{low:.3f}, {high:.3f}]."
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
        from accelerate import Accelerator

        if settings.lora_rank == 0:
            raise FinetuneError('loss "probe" trains an adapter: give a --lora-rank above 0')
        accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
        self.chat = ChatFormat.from_directory(model)
        self._files = {"train": train, "held-out": held_out}
        self._prompts = {
            name: prompts_of(file.records, self.chat, settings.system_prompt)
            for name, file in self._files.items()
        }
        # A layer is compiled for one kind of input, and only those above the first adapted one need a gradient.
        adapted = load_model(model, replace(settings, compile=False), DEPTH)
        super().__init__(model, out, settings, accelerator, Probe(adapted))

    @property
    def _probe(self) -> Probe:
        return self.accelerator.unwrap_model(self.scorer)  # type: ignore[no-any-return]

    def run(self, resume: bool = False) -> Path:
        final = super().run(resume)
        self.known = self._known()
        return final

    def _lengths(self) -> list[int]:
        self.train, self.held_out = (self._answers(name) for name in self._files)
        return [len(document.ids) for document in self.train.documents]

    def _answers(self, name: str) -> Labelled:
        settings, file, prompts = self.settings, self._files[name], self._prompts[name]

        def sample(seed: int, some: list[Sequence[int]]) -> list[list[str]]:
            torch.manual_seed(settings.seed + seed)
            write = partial(
                generate,
                self._probe.model,
                self.chat,
                tag=TAG,
                max_tokens=settings.max_tokens,
                samples=settings.samples,
            )
            return passes.answers(self.accelerator, some, write)

        path = self.directory.path / f"{name}.jsonl"
        found = answered(self.accelerator, file.records, prompts, sample, path)
        return Labelled.of(found, file, prompts, self.chat, settings.max_tokens)

    def _prepare(self) -> None:
        some, right = self.train.documents[:FIRST_FIT], self.train.right[:FIRST_FIT]
        self._probe.begin(self._states(some), torch.tensor(right))
        self.progress.verdicts = torch.stack([self._verdicts()] * 2)

    def _losses(self, numbers: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, bool]]:
        documents = self.train.documents
        times = sum(self.train.times[i] for i in numbers)
        tokens = sum(len(documents[i].ids) - documents[i].learnt for i in numbers)
        for share, counts in self._shares(numbers):
            batch = collate([documents[i] for i in share]).to(self.accelerator.device)
            right, given = (
                torch.tensor([float(of[i]) for i in share], device=self.accelerator.device)
                for of in (self.train.right, self.train.times)
            )
            with torch.no_grad():
                before, _ = self.scorer(batch, adapted=False)
            after, h = self.scorer(batch)
            verdict = F.binary_cross_entropy_with_logits(
                self._probe.verdict(h), right, given, reduction="sum"
            )
            held = F.kl_div(after, before, log_target=True, reduction="sum")
            yield verdict / times + held / tokens, counts

    def _states(self, documents: Sequence[Example]) -> Tensor:
        """(n, H) of the model as it is."""
        return passes.states(self.accelerator, self.scorer, documents, self.settings.micro_batch)

    @torch.no_grad()
    def _verdicts(self) -> Tensor:
        """f (n,) of the held-out answers."""
        states = self._states(self.held_out.documents).to(self.accelerator.device)
        return self._probe.verdict(states).cpu()

    def _evaluate(self) -> dict[str, float]:
        self._latest = self._verdicts()
        right, times = (
            torch.tensor(of, dtype=torch.float32) for of in (self.held_out.right, self.held_out.times)
        )
        loss = F.binary_cross_entropy_with_logits(self._latest, right, times, reduction="sum") / times.sum()
        return {"held_out_loss": float(loss), "held_out_auroc": auroc(self._latest, right)}

    def _keep(self) -> None:
        super()._keep()
        self.progress.verdicts[1] = self._latest

    def _known(self) -> Known:
        side, before_after = self.held_out, self.progress.verdicts
        y, prompts = torch.tensor(side.right).long(), torch.tensor(side.prompt)
        folds = split(side.prompt, y.tolist(), (1 / FOLDS,) * FOLDS, self.settings.seed)
        evidence = self._evidence()
        blocks: list[Block] = [(1, "feature"), (len(EVIDENCE), "feature")]
        beside = [
            cross_validated(
                torch.cat([f.unsqueeze(1), evidence], 1).double(), y, blocks, folds, (EVIDENCE_REACH,)
            )[0]
            for f in before_after
        ]
        rows = [(prompts == prompt).nonzero().squeeze(1) for prompt in prompts.unique()]
        rng, gains = draw(self.settings.seed, "gain"), []
        for _ in range(REDRAWS):
            at = torch.cat(rng.choices(rows, k=len(rows)))
            gains.append(auroc(beside[1][at], y[at]) - auroc(beside[0][at], y[at]))
        low, high = torch.tensor(gains).nanquantile(torch.tensor([0.025, 0.975])).tolist()
        alone, together = ((auroc(one[0], y), auroc(one[1], y)) for one in (before_after, beside))
        return Known(alone, together, (low, high))

    @torch.no_grad()
    def _evidence(self) -> Tensor:
        """Of the held-out answers' tokens, by the model before: (n, 6), as it is served."""
        closing, _ = self.chat.closing(TAG)
        documents, size = self.held_out.documents, self.settings.micro_batch
        found = []
        for start in range(0, len(documents), size):
            batch = collate(documents[start : start + size]).to(self.accelerator.device)
            log_p, _ = self.scorer(batch, adapted=False)
            measured = surprisal_and_margin(log_p, batch.targets).cpu()
            for row in range(len(batch.tag)):
                own = measured[(batch.document == row).cpu()][: -len(closing)]
                found.append(features(EVIDENCE, own[:, 0].tolist(), own[:, 1].tolist()))
        return torch.stack(found)
