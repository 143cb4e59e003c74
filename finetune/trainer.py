"""Cross-entropy fine-tuning with LoRA on the learnt positions of each document.

Logits are computed at the learnt positions alone: at small models the LM head is a good part of a step, and
most positions are prompt. Documents are batched by length, so little of a batch is padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.examples import Example


@dataclass(frozen=True)
class TrainingSettings:
    """learning_rate: peak; linear warm-up over `warmup` of the steps, then linear decay to 0."""

    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    batch_size: int = 16
    epochs: int = 1
    lora_rank: int = 16
    lora_alpha: int = 32
    seed: int = 0
    compile: bool = True
    checkpoint_every: int = 50


def train_lora(model_dir: Path, examples: Sequence[Example], out: Path, settings: TrainingSettings) -> Path:
    """Trains an adapter of `model_dir` on `examples`, writes it to `out` in peft's format and returns `out`.

    A run that was stopped goes on from `out`'s last checkpoint with the same order of documents.
    """
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(settings.seed)
    # Eager attention: at these lengths the fused kernel's backward pass alone took a third of a step.
    base = AutoModelForCausalLM.from_pretrained(
        str(model_dir), dtype=torch.bfloat16, local_files_only=True, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    batches = [b for epoch in range(settings.epochs) for b in _batches(examples, settings, epoch)]
    warmup = max(1, int(settings.warmup * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warmup, (len(batches) - s) / max(1, len(batches) - warmup))
    )
    if settings.compile:
        # Layer by layer: all layers share one compilation, which takes seconds instead of minutes.
        torch._dynamo.config.specialize_float = True  # the adapters' scale is a constant
        for layer in base.model.layers:
            layer.compile(dynamic=True)
        base.enable_input_require_grads()  # else the first layer differs from the others and is compiled apart

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"{checkpoint} is of a run with other settings; remove it or keep the settings")
        peft.set_peft_model_state_dict(model, state["adapter"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    progress = tqdm(batches[start:], initial=start, total=len(batches), desc="fine-tuning", unit="batch")
    average = None
    for step, batch in enumerate(progress, start + 1):
        loss = _loss(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
        if step % settings.checkpoint_every == 0:
            state = {
                "settings": asdict(settings),
                "adapter": peft.get_peft_model_state_dict(model),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    model.to(torch.bfloat16).save_pretrained(str(out))
    checkpoint.unlink(missing_ok=True)
    return out


def _loss(
    model: Any, ids: torch.Tensor, attention: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy over the learnt positions. ids, attention (B, L); index, targets (T,) into (B*L)."""
    with torch.autocast("cpu", torch.bfloat16):
        inner = model.get_base_model()
        states = inner.model(input_ids=ids, attention_mask=attention, use_cache=False)[0]  # (B, L, H)
        logits = inner.lm_head(states.flatten(0, 1)[index])  # (T, V)
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def _batches(
    examples: Sequence[Example], settings: TrainingSettings, epoch: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """One epoch's batches in random order, documents of like length together."""
    rng = random.Random(settings.seed * 1000 + epoch)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rng.random()))
    chunks = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        yield _collate([examples[i] for i in chunk])


def _collate(batch: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    attention = torch.zeros(len(batch), width, dtype=torch.long)
    index, targets = [], []
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attention[row, : len(example.ids)] = 1
        for position in range(example.learnt, len(example.ids)):
            index.append(row * width + position - 1)  # the state before a token predicts it
            targets.append(example.ids[position])
    return ids, attention, torch.tensor(index), torch.tensor(targets)
