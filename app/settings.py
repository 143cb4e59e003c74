"""Everything that can be set, read once at start.

Environment variables are the names below in capitals with the prefix `CANDOR_`; an option of
`candor serve` with the same name goes before the variable. What the bundle decides (dtype, representation,
generation policy, alphas) cannot be set: a server that deviates from it would not be calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Immutable; pass values on, never this object into the mathematics or the engine."""

    model_config = SettingsConfigDict(
        env_prefix="CANDOR_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    model: Path = Field(description="Directory of the model to serve: config.json, safetensors, tokenizer.")
    bundle: Path = Field(description="Directory of the bundle that was calibrated for this model.")
    host: str = Field(
        default="127.0.0.1", description="Address to listen on. There are no API keys yet: keep it local."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that requests give as `model`; without it, the bundle's name.",
    )

    engine: Literal["vllm", "transformers"] = Field(default="vllm", description="What generates.")
    max_model_len: PositiveInt = Field(
        default=2048, description="Longest sequence in tokens: prompt, answer and tag."
    )
    max_num_seqs: PositiveInt = Field(default=64, description="Most answers written at once; others wait.")
    max_num_batched_tokens: PositiveInt = Field(
        default=2048, description="Tokens computed per step; longer prompts are computed in chunks."
    )
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="Memory of the KV cache; without it, the engine's own choice."
    )
    eager: bool = Field(default=False, description="No compilation: starts sooner, answers more slowly.")

    estimator: Literal["lower", "plain"] = Field(
        default="lower",
        description="What admits an answer: `lower` counts how few calibration points stand behind it, "
        "`plain` does not.",
    )
    alpha: float | None = Field(
        default=None,
        description="Accuracy asked for where a request names none; without it, the lowest the bundle has.",
    )
    refusal_text: str = Field(
        default="I do not know this reliably enough to answer.",
        min_length=1,
        description="What a client reads where an answer is withheld.",
    )
    fallback_text: str | None = Field(
        default=None,
        min_length=1,
        description='Answer given in place of a withheld one with `on_abstain: "fallback"`, for example '
        "where to find a person. Without it such requests are refused.",
    )
    scoring_timeout_s: PositiveFloat = Field(
        10.0, description="Seconds after which an answer's score is given up and its region is `unavailable`."
    )

    max_body_bytes: PositiveInt = Field(default=1 << 20, description="Largest request body; above it, 413.")
    max_prompt_tokens: PositiveInt | None = Field(
        default=None, description="Longest prompt; without it, what the model holds."
    )
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="Largest `max_tokens`; without it, what the model holds."
    )
    max_choices: PositiveInt = Field(
        default=16, description="Most answers in one request: `n` times its prompts."
    )
    max_exemplars: int = Field(
        default=10,
        ge=0,
        description="Most exemplars shown with an answer; 0 keeps the calibration's texts private.",
    )
    max_in_flight: PositiveInt = Field(
        default=256, description="Answers being written or waiting to be; above it, 503 with Retry-After."
    )

    engine_check_interval_s: PositiveFloat = Field(
        1.0, description="Seconds between looks at the engine's health."
    )
    drain_timeout_s: PositiveInt = Field(
        default=30, description="Seconds that running answers get after SIGTERM."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_choices > self.max_in_flight:
            raise ValueError(
                f"max_choices ({self.max_choices}) must not exceed max_in_flight ({self.max_in_flight}): "
                "such a request could never be let in"
            )
        return self
