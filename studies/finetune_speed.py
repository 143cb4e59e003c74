"""Training speed beside the public implementation's way, on the same documents in one run.

    python -m studies.finetune_speed --model DIR --data pairs.jsonl

An epoch of SDM fine-tuning with hard negatives does four things; the public code (as arXiv 2510.26183's, described,
not copied) does them one example at a time:

                         here                               the public way
    states for the layer one batched pass                   one forward an example, asking for one new token
    step                 logits at learnt positions,        all logits; eager
                         layers compiled
    h of the step        from the step's own pass           one forward an example, asking for one new token
    hard negatives       those of 16 steps at once,         one at a time, without a KV cache
                         with a KV cache

The two ways take turns; tokens are those of the documents of the step. Process time, so that on a CPU other
programs count little.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from candor.engine.prompt import ChatFormat
from candor.finetune.batches import Batch, collate
from candor.finetune.data import load_pairs
from candor.finetune.documents import TAG
from candor.finetune.examples import Example, negative, positive
from candor.finetune.forward import LearntPositions
from candor.finetune.generation import generate
from candor.finetune.loss import MASKED, sdm_next_token_loss
from candor.finetune.model import load_model
from candor.finetune.objectives import sdm_loss
from candor.finetune.settings import FinetuneSettings
from candor.finetune.word_ordering import SYSTEM_PROMPT

MAX_TOKENS = 40
AHEAD = FinetuneSettings().generate_ahead


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model.")],
    data: Annotated[Path, typer.Option(help="Pairs, as for `candor finetune`.")],
    documents: Annotated[int, typer.Option(min=4, help="A step's; half of them are negatives.")] = 16,
    gamma_gen: Annotated[
        float, typer.Option(min=0, max=1, help="How many of those are generated; 1 is the public default.")
    ] = 1.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    chat = ChatFormat.from_directory(model)
    pairs = load_pairs(data)
    generated = round(documents / 2 * gamma_gen)  # a step
    system = {"role": "system", "content": SYSTEM_PROMPT}
    prompts = [chat.encode_chat([system, *pair.messages]) for pair in pairs[: AHEAD * documents]]
    examples = [
        (positive if i % 2 else negative)(chat, prompts[i], pair.positive if i % 2 else pair.negative, TAG)
        for i, pair in enumerate(pairs[:documents])
    ]
    here = _Here(model, chat, examples, prompts[: AHEAD * generated])
    public = _Public(model, chat, examples, prompts[:generated])
    ways: dict[str, Callable[[], dict[str, float]]] = {"here": here.epoch, "public way": public.epoch}
    for way in ways.values():
        way()  # compiles, and warms caches
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    tokens = sum(len(example.ids) for example in examples)
    ratios = [
        sum(theirs.values()) / sum(ours.values())
        for ours, theirs in zip(seconds["here"], seconds["public way"], strict=True)
    ]
    median = {
        name: {part: statistics.median(r[part] for r in runs) for part in runs[0]}
        for name, runs in seconds.items()
    }
    speeds = {name: tokens / sum(parts.values()) for name, parts in median.items()}
    if as_json:
        typer.echo(
            json.dumps({"seconds": seconds, "tokens": tokens, "tokens_per_second": speeds, "ratios": ratios})
        )
        return
    typer.echo(
        "| part, seconds of processor time (median) | here | public way | ratio |\n| --- | --- | --- | --- |"
    )
    for part, ours in median["here"].items():
        theirs = median["public way"][part]
        typer.echo(f"| {part} | {ours:.2f} | {theirs:.2f} | {f'{theirs / ours:.1f}' if ours else ''} |")
    typer.echo(f"\ntokens a second: here {speeds['here']:.0f}, public way {speeds['public way']:.0f}")
    typer.echo(f"ratio of each round: {', '.join(f'{ratio:.1f}' for ratio in ratios)}")


class _Here:
    def __init__(
        self, model: Path, chat: ChatFormat, examples: list[Example], asked: list[list[int]]
    ) -> None:
        self.scorer = LearntPositions(load_model(model, FinetuneSettings()))
        self.chat, self.asked = chat, asked
        self.batch = collate(examples)
        self.value = torch.full((len(examples),), 0.5)

    def epoch(self) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return {
                "states for the layer": _timed(self._states),
                "step": _timed(self._step),
                "h of the step": 0.0,
                "hard negatives": _timed(self._generate) / AHEAD,
            }

    def _generate(self) -> None:
        generate(self.scorer.model, self.chat, self.asked, TAG, MAX_TOKENS)

    @torch.no_grad()
    def _states(self) -> None:
        self.scorer(self.batch, with_logits=False)

    def _step(self) -> None:
        logits, _ = self.scorer(self.batch)
        loss = sdm_loss(logits, self.batch.targets, self.value[self.batch.document]).mean()
        loss.backward()
        self.scorer.zero_grad()


class _Public:
    def __init__(
        self, model: Path, chat: ChatFormat, examples: list[Example], asked: list[list[int]]
    ) -> None:
        self.model: Any = load_model(model, FinetuneSettings(compile=False))
        self.chat, self.examples, self.asked = chat, examples, asked
        self.batch: Batch = collate(examples)
        self.labels = torch.full(self.batch.ids.shape, MASKED)
        for row, example in enumerate(examples):
            self.labels[row, example.learnt : len(example.ids)] = torch.tensor(example.ids[example.learnt :])
        self.value = torch.full((len(examples),), 0.5)

    def epoch(self) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return {
                "states for the layer": _timed(self._states),
                "step": _timed(self._step),
                "h of the step": _timed(self._states),
                "hard negatives": _timed(self._generate),
            }

    @torch.no_grad()
    def _states(self) -> None:
        for example in self.examples:
            out = self.model.generate(
                torch.tensor([example.ids[: example.tag + 1]]),
                max_new_tokens=1,
                do_sample=False,
                output_hidden_states=True,
                return_dict_in_generate=True,
                pad_token_id=self.chat.end_id,
            )
            last = out.hidden_states[0][-1][0].float()
            torch.cat([last.mean(0), last[-1]])

    def _step(self) -> None:
        logits = self.model(self.batch.ids, attention_mask=self.batch.attention, use_cache=False).logits
        sdm_next_token_loss(logits.float(), self.labels, self.value).backward()
        self.model.zero_grad()

    @torch.no_grad()
    def _generate(self) -> None:
        for prompt in self.asked:
            self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                use_cache=False,
                pad_token_id=self.chat.end_id,
            )


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
