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
        default="127.0.0.1",
        description="Address to listen on; without keys, only one of this machine itself.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that requests give as `model`; without it, the bundle's name.",
    )

    keys: Path | None = Field(
        default=None,
        description="File of API keys' hashes, made by `candor key`; without it whoever reaches the server may "
        "ask.",
    )
    open_to_all: bool = Field(
        default=False,
        description="Listen on other addresses without keys too: for a container whose port only this machine "
        "reaches.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="Certificate chain in PEM; with it the server speaks HTTPS alone."
    )
    tls_key: Path | None = Field(default=None, description="The certificate's private key in PEM.")

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
    least_mode: Literal["off", "annotate", "abstain"] = Field(
        default="off",
        description="Least mode of every request, whatever it asks for: `annotate` checks each answer, `abstain` "
        "withholds each that is not reliable.",
    )
    certified_only: bool = Field(
        default=False,
        description="Answer nothing that the bundle's certificate does not cover, whatever the request asks for.",
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
    max_in_flight_tokens: PositiveInt = Field(
        default=1 << 19,
        description="Tokens of their prompts and, at their longest, answers; above it, 503 with Retry-After.",
    )
    requests_per_minute: PositiveInt | None = Field(
        default=None,
        description="Requests for answers that each key may make; above it, 429 with Retry-After.",
    )
    tokens_per_minute: PositiveInt | None = Field(
        default=None,
        description="Tokens that each key may ask for, prompts and longest answers; above it, 429 with "
        "Retry-After.",
    )
    request_timeout_s: PositiveFloat = Field(
        600.0,
        description="Seconds an answer may take, waiting included; a client asks for fewer with the header "
        "`x-request-timeout`. Then 503, and its place in the engine is free.",
    )

    feedback: Path | None = Field(
        default=None, description="SQLite file for verdicts and feedback on them; without it none is taken."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people, or one JSON object a line."
    )
    log_bodies: bool = Field(
        default=False, description="Log what clients send and get, prompts and answers included."
    )

    engine_check_interval_s: PositiveFloat = Field(
        1.0, description="Seconds between looks at the engine's health."
    )
    engine_stall_timeout_s: PositiveFloat = Field(
        120.0,
        description="Seconds of silence, while somebody waits, after which the engine is asked for one token; "
        "without it for as long again, the server ends with code 1.",
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
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        return self
