"""A LoRA probe: a linear head on the final state at the tag, trained together with an adapter.

    python -m studies.knows.probe --model M --records train.jsonl --answers train.pt --number 2000 --out DIR

    loss = mean_i BCE(f_i, right_i) + kl mean_t KL(p_before(t) || p(t)) + contrast mean_{i, j} softplus(f_j - f_i)
    f_i  =  w . [state at the tag of answer i ; its evidence, where it is to know what evidence does not] + b

over answers i; positions t of answers and tags, where the language is held to what it was; and pairs of a right
answer i and a wrong answer j to one prompt. w and b begin at the logistic regression on frozen states. The adapter is
then merged: `model/` in `out` is served and calibrated like any other. A stopped run goes on where it was.

It uses the GPU where there is one, also under `accelerate launch --config_file finetune/configs/one.yaml -m ...`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from candor.calibration.logistic import fit_standardised
from candor.engine.base import EVIDENCE
from candor.finetune.batches import shuffled_batches
from candor.finetune.merge import merge, replace_directory
from candor.finetune.model import TARGETS
from studies.knows.packed import Asked, Packed, first_answers, pack, read

REACH = 0.3
"""Of the regression that the head begins at (`calibration.logistic`)."""
CHECKPOINT_EVERY = 25
KINDS = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Settings:
    """number: answers to learn from, of random prompts. prompts: of a step. depth: the adapter's share of the layers,
    from the last. warmup: share of the steps, before a linear decay to 0. beside: the head sees the evidence too.
    steps: stop after so many, for a dry run."""

    number: int
    epochs: int = 2
    prompts: int = 8
    learning_rate: float = 5e-4
    rank: int = 8
    depth: float = 0.34
    kl: float = 1.0
    contrast: float = 0.0
    beside: bool = False
    warmup: float = 0.1
    seed: int = 0
    steps: int | None = None


class Probe(nn.Module):
    """The adapted model and its head, as one module that accelerate can wrap. Layers below the first adapted one
    always give the same, so their states are computed once for each prompt."""

    model: Any
    mean: Tensor
    scale: Tensor

    def __init__(self, model: Any, first: int, hidden: int, evidence: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(hidden + evidence, 1)
        self.register_buffer("mean", torch.zeros(hidden + evidence))
        self.register_buffer("scale", torch.ones(hidden + evidence))
        decoder, end = model.get_decoder(), model.config.num_hidden_layers
        # In a tuple, since they own nothing.
        self.parts = part(decoder, slice(0, first), last=False), part(decoder, slice(first, end), last=True)

    @property
    def upper(self) -> Any:
        return self.parts[1]

    @torch.no_grad()
    def lower(self, packed: Packed) -> Tensor:
        """What the adapted layers are given: (b, L, H)."""
        return self.run(self.parts[0], packed, input_ids=packed.ids).view(*packed.ids.shape, -1)

    @torch.no_grad()
    def before(self, packed: Packed, middle: Tensor) -> Tensor:
        """States (t, H) at `held` without the adapter."""
        with self.model.disable_adapter():
            return self.run(self.upper, packed, inputs_embeds=middle)[packed.held]

    @torch.no_grad()
    def begin(self, state: Tensor, evidence: Tensor, y: Tensor) -> None:
        """Sets the head to regressions on frozen states (n, H) and on evidence (n, 0 or 6), y: (n,). That on states
        is held close to the base rate: one that fits these very answers would leave the adapter nothing to learn."""
        x = torch.cat([state, evidence], 1)
        self.mean.copy_(x.mean(0))
        spread = state.var(0).mean().sqrt().expand(state.shape[1])
        self.scale[: state.shape[1]] = spread
        ((w, b),) = fit_standardised(state, y.long(), [(state.shape[1], "scalar")], (REACH,))
        if evidence.shape[1]:
            self.scale[state.shape[1] :] = evidence.std(0)
            ((v, c),) = fit_standardised(evidence, y.long(), [(evidence.shape[1], "feature")], (10.0,))
            w, b = torch.cat([w, v]), c - w @ state.mean(0).double()
        self.head.weight.copy_((w * self.scale).float().unsqueeze(0))
        self.head.bias.copy_((b + w @ self.mean.double()).float())

    def forward(
        self, packed: Packed, middle: Tensor, evidence: Tensor, logits: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """middle (b, L, H): what the adapted layers are given. f (a,) float32, states at the tags (a, H) float32,
        log-probabilities (t, V) at `held` or None."""
        states = self.run(self.upper, packed, inputs_embeds=middle)
        tag = states[packed.tag].float()
        x = torch.cat([tag, evidence], 1)[:, : len(self.mean)]
        f = (x - self.mean) / self.scale @ self.head.weight.float().squeeze(0) + self.head.bias.float()
        return f, tag, self.log_p(states[packed.held]) if logits else None

    def run(self, part: Any, packed: Packed, **given: Tensor) -> Tensor:
        """Last states (b * L, H) of a part of the decoder."""
        masks = by_kind(part.config, packed.mask)
        found = part(position_ids=packed.positions, attention_mask=masks, use_cache=False, **given)[0]
        return found.flatten(0, 1)  # type: ignore[no-any-return]

    def log_p(self, states: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states).float().log_softmax(1)  # type: ignore[no-any-return]


def by_kind(config: Any, mask: Tensor) -> Any:
    """The same mask for every kind of layer, where a model has several: no sequence here is as long as a window."""
    return {kind: mask for kind in KINDS} if "sliding_attention" in (config.layer_types or ()) else mask


def part(decoder: Any, layers: slice, last: bool) -> Any:
    """The decoder with some of its layers alone, which it shares. last: and with its norm."""
    shared = copy(decoder)
    shared._modules = dict(decoder._modules)
    shared.layers = decoder.layers[layers]
    shared.norm = decoder.norm if last else nn.Identity()
    shared.config = deepcopy(decoder.config)
    kinds = getattr(decoder.config, "layer_types", None)
    shared.config.layer_types = kinds and kinds[layers]
    shared.config.num_hidden_layers = len(shared.layers)
    return shared


def load(directory: Path, settings: Settings, evidence: int) -> Probe:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=torch.bfloat16,
        local_files_only=True,
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
    )
    layers = base.config.num_hidden_layers
    first = layers - round(settings.depth * layers)
    torch.manual_seed(settings.seed)
    adapted: Any = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=TARGETS,
            layers_to_transform=list(range(first, layers)),
            task_type="CAUSAL_LM",
        ),
    )
    return Probe(adapted, first, base.config.hidden_size, evidence).train()


def contrast(f: Tensor, label: Tensor, group: Tensor) -> Tensor:
    """Mean over pairs of a right and a wrong answer to one prompt of softplus(f_wrong - f_right); 0 without any."""
    pairs = (group.unsqueeze(1) == group) & (label.unsqueeze(1) > label)
    return (F.softplus(f - f.unsqueeze(1)) * pairs).sum() / pairs.sum().clamp(min=1)


class Frozen:
    """What is the same in every step, by prompt: the adapted layers' input, and final states without the adapter."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.middle: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def of(self, some: Sequence[Asked], packed: Packed) -> tuple[Tensor, Tensor]:
        """(b, L, H) and (t, H)."""
        if any(one.digest not in self.middle for one in some):
            middle = self.probe.lower(packed)
            before = self.probe.before(packed, middle)
            sizes = [1 + sum(len(answer) - 1 for answer in one.answers) for one in some]
            for one, own, states in zip(some, middle.cpu(), before.cpu().split(sizes), strict=True):
                self.middle[one.digest] = own[: one.length].clone()
                self.before[one.digest] = states.clone()
        middle = pad_sequence([self.middle[one.digest] for one in some], batch_first=True)
        before = torch.cat([self.before[one.digest] for one in some])
        return middle.to(packed.ids.device), before.to(packed.ids.device)


def losses(probe: Any, some: Sequence[Asked], frozen: Frozen) -> dict[str, Tensor]:
    """probe: as accelerate wraps it."""
    device = next(probe.parameters()).device
    packed = pack(some, torch.bfloat16).to(device)
    label, weight, evidence = (
        torch.cat([getattr(one, name) for one in some]).to(device) for name in ("label", "weight", "evidence")
    )
    middle, before = frozen.of(some, packed)
    f, _, log_p = probe(packed, middle, evidence)
    with torch.no_grad():
        log_p_before = frozen.probe.log_p(before)
    return {
        "probe": F.binary_cross_entropy_with_logits(f, label, weight, reduction="sum") / weight.sum(),
        "kl": F.kl_div(log_p, log_p_before, log_target=True, reduction="batchmean"),
        "contrast": contrast(f, label, packed.group),
    }


def train(asked: Sequence[Asked], model: Path, out: Path, settings: Settings) -> Probe:
    """Trains, from the last checkpoint in `out` where there is one, and writes adapter and head."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16")
    evidence = len(EVIDENCE) if settings.beside else 0
    probe = load(model, settings, evidence)
    states, figures, label = (
        torch.cat([getattr(one, name) for one in asked]) for name in ("frozen", "evidence", "label")
    )
    probe.begin(states, figures[:, :evidence], label)
    trained = [p for p in probe.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    wrapped, optimiser = accelerator.prepare(probe, optimiser)
    frozen = Frozen(probe)
    plan = [
        batch
        for epoch in range(settings.epochs)
        for batch in shuffled_batches(
            [one.length for one in asked], settings.prompts, random.Random(f"{settings.seed}:{epoch}")
        )
    ]
    total, checkpoint, done = len(plan), out / "checkpoint.pt", 0
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device)
        if state["settings"] | {"steps": None} != asdict(settings) | {"steps": None}:
            raise typer.BadParameter(
                f"{out} holds a run with other settings, {state['settings']}: give another --out"
            )
        for p, kept in zip(trained, state["trained"], strict=True):
            p.data.copy_(kept)
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    end = total if settings.steps is None else min(settings.steps, total)
    with tqdm(total=end, initial=done, unit="step", mininterval=10) as bar:
        for step in range(done, end):
            share = (step + 1) / total
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * min(
                    1, share / settings.warmup, (1 - step / total) / 0.9
                )
            with accelerator.autocast():
                found = losses(wrapped, [asked[i] for i in plan[step]], frozen)
            loss = found["probe"] + settings.kl * found["kl"] + settings.contrast * found["contrast"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            bar.update()
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == end:
                bar.write(
                    f"{step + 1} "
                    + " ".join(f"{name} {float(value.detach()):.4f}" for name, value in found.items())
                )
                state = {"settings": asdict(settings), "done": step + 1, "optimiser": optimiser.state_dict()}
                torch.save(state | {"trained": [p.data for p in trained]}, out / "checkpoint.unfinished")
                (out / "checkpoint.unfinished").replace(checkpoint)
    return probe


@torch.inference_mode()
def judged(probe: Probe, asked: Sequence[Asked], prompts: int = 8) -> tuple[Tensor, Tensor]:
    """f (a,) and states at the tags (a, H) of all their answers, in order."""
    probe.eval()
    device = next(probe.parameters()).device
    order = sorted(range(len(asked)), key=lambda i: asked[i].length)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(order), prompts):
        numbers = order[start : start + prompts]
        some = [asked[i] for i in numbers]
        evidence = torch.cat([one.evidence for one in some]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            packed = pack(some, torch.bfloat16).to(device)
            f, tag, _ = probe(packed, probe.lower(packed), evidence, logits=False)
        sizes = [len(one.answers) for one in some]
        for i, own, state in zip(numbers, f.cpu().split(sizes), tag.cpu().split(sizes), strict=True):
            found[i] = own, state
    f, states = (torch.cat([found[i][part] for i in range(len(asked))]) for part in (0, 1))
    return f, states


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model whose answers they are.")],
    records: Annotated[Path, typer.Option(help="The prompts, JSON Lines.")],
    answers: Annotated[Path, typer.Option(help="Answers to them, .pt (studies.knows.answers).")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    number: Annotated[int, typer.Option(min=1, help="Answers to learn from.")],
    held_records: Annotated[Path | None, typer.Option(help="Prompts to measure on.")] = None,
    held_answers: Annotated[Path | None, typer.Option(help="Answers to those.")] = None,
    epochs: int = 2,
    prompts: Annotated[int, typer.Option(help="Of a step.")] = 8,
    learning_rate: float = 5e-4,
    rank: int = 8,
    depth: float = 0.34,
    kl: float = 1.0,
    contrast: float = 0.0,
    beside: bool = False,
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="Stop after so many: a dry run.")] = None,
    merged: Annotated[bool, typer.Option(help="Write model/.")] = False,
) -> None:
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    settings = Settings(
        number, epochs, prompts, learning_rate, rank, depth, kl, contrast, beside, seed=seed, steps=steps
    )
    asked = first_answers(read(model, records, answers), number, seed)
    probe = train(asked, model, out, settings)
    probe.model.save_pretrained(str(out / "adapter"))
    with torch.no_grad():  # f = w . state + b, of [state ; evidence] as they are
        w = probe.head.weight.squeeze(0) / probe.scale
        torch.save({"w": w.cpu(), "b": (probe.head.bias - w @ probe.mean).cpu()}, out / "head.pt")
    if held_records and held_answers:
        held = read(model, held_records, held_answers)
        f, states = judged(probe, held)
        torch.save({"f": f, "states": states, "settings": asdict(settings)}, out / "held.pt")
    if merged:
        replace_directory(out / "model", lambda path: merge(model, out / "adapter", path))


if __name__ == "__main__":
    typer.run(main)
