"""Settings of a fine-tuning run. They are stored with its checkpoints: a run resumes only with the same settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from candor.calibration.epochs import LayerSettings

Loss = Literal["sdm", "ce", "ual", "first", "probe"]
"""sdm: base 2 + SDM(z')_r (arXiv 2510.26183). ce: cross-entropy. ual: label smoothing by uncertainty
(2406.04854). first: distillation of a teacher's recalibrated top five (2408.12168). probe: a verdict on the model's
own answers, which stay as they are (2509.03531)."""


COUNTS = (
    *("epochs", "batch_size", "micro_batch", "max_tokens", "evaluations", "samples"),
    *("generate_ahead", "checkpoint_every"),
)


@dataclass(frozen=True)
class FinetuneSettings:
    """The defaults are for LoRA on a small model; docs/finetuning.md has the papers'.

    batch_size: documents per step, over all processes. micro_batch: documents per forward pass and process.
    learning_rate: peak; linear warm-up over the share `warmup` of the steps, then linear decay to 0.
    lora_rank: 0 trains every parameter. lora_alpha is twice the rank.
    gamma_plus: probability that a document is shown as a positive. hard_negatives: whether wrong answers that the
    model generates are shown besides the static ones, from epoch `generate_from` (from 0) on. gamma_gen: probability
    that a negative is generated anew. gamma_diversity: probability that a generated one, if any, replaces the static
    one. layer: settings of the SDM layers. evaluations: number per epoch; each trains its own layer.
    generate_ahead: steps whose hard negatives are generated together. checkpoint_every: steps per checkpoint.
    Raises ValueError for values outside their range.
    """

    loss: Loss = "sdm"
    hard_negatives: bool = True
    generate_from: int = 1
    epochs: int = 2
    batch_size: int = 16
    micro_batch: int = 16
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    lora_rank: int = 16
    gamma_plus: float = 0.5
    gamma_gen: float = 0.5
    gamma_diversity: float = 0.5
    system_prompt: str | None = None
    max_tokens: int = 128
    seed: int = 0
    layer: LayerSettings = field(default_factory=LayerSettings)
    evaluations: int = 2
    samples: int = 4
    generate_ahead: int = 16
    checkpoint_every: int = 64
    bf16: bool = True
    gradient_checkpointing: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gamma_plus", "gamma_gen", "gamma_diversity", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.loss == "sdm" and self.gamma_plus in (0, 1):
            raise ValueError(
                f'loss "sdm" learns from right and wrong: give a gamma_plus between 0 and 1, not {self.gamma_plus}'
            )
        if self.learning_rate <= 0 or self.lora_rank < 0 or self.generate_from < 0:
            raise ValueError("learning_rate must be above 0, lora_rank and generate_from not below 0")
        if self.checkpoint_every % self.generate_ahead:
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of generate_ahead "
                f"({self.generate_ahead}): a checkpoint lies between two rounds of generation"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
