"""The settings of the server, read once at start.

Each name below, in capitals with the prefix `CANDOR_`, is an environment variable; the option of `candor serve`
with the same name overrides it. What the bundle decides (dtype, representation, generation policy, alphas)
cannot be set: a server that deviates from the bundle would not be calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split(value: Any) -> Any:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _path(value: str) -> str:
    if not value.startswith("/") or value.endswith("/"):
        raise ValueError(f"expected a path such as /candor, got {value!r}")
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Separated by commas in the environment."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """Immutable settings. Pass single values to the mathematics and the engine, never this object."""

    model_config = SettingsConfigDict(
        env_prefix="CANDOR_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    model: Path = Field(description="Directory of the model: config.json, safetensors files, tokenizer.")
    bundle: Path = Field(description="Directory of the bundle that was calibrated for this model.")
    shadow: Path | None = Field(
        default=None,
        description="Directory of a second bundle of the same name that scores each answer too, once it is sent, and "
        "decides nothing. It can be promoted.",
    )
    bundle_key: Path | None = Field(
        default=None,
        description="Public key in PEM format. With it, a bundle is served, shadows or is promoted only if it was "
        "signed with the private one (`candor bundle sign`).",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. Without keys, only a loopback address is allowed.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    served_model_name: Annotated[Names, MinLen(1)] | None = Field(
        default=None,
        description="Model names that requests may give, separated by commas; responses and metrics show the "
        "first. Without it, the bundle's name.",
    )
    root_path: Annotated[str, AfterValidator(_path)] | None = Field(
        default=None,
        description="Path under which a proxy serves this server, such as `/candor`, whether or not the proxy takes "
        "it off.",
    )

    keys: Path | None = Field(
        default=None,
        description="File of API key hashes, made by `candor key`. Without it, everybody who reaches the "
        "server may use it.",
    )
    keys_grace_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that the keys read last stay valid while their file cannot be read; then everybody is "
        "locked out.",
    )
    quotas: Path | None = Field(
        default=None,
        description="SQLite file of the tokens that each key used in a day. Without it, a restart forgives them. "
        "With a PostgreSQL store they are counted there, for all replicas.",
    )
    audit_log: Path | None = Field(
        default=None,
        description="File with one JSON line per request: who asked what kind of thing and got which verdict, no "
        "texts. Without it, none is kept.",
    )
    allowed_hosts: Names | None = Field(
        default=None,
        description="Host names that requests may use, separated by commas; `*` allows all. Without it, a server "
        "without keys on a loopback address takes that address and localhost, any other takes all.",
    )
    cors_origins: Names | None = Field(
        default=None,
        description="Origins of web pages that may use this server, such as `https://app.example`, separated by "
        "commas. Without it, none from elsewhere.",
    )
    open_to_all: bool = Field(
        default=False,
        description="Allow other addresses without keys: for a container whose port only this machine "
        "reaches.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="Certificate chain in PEM format. With it, the server speaks HTTPS only."
    )
    tls_key: Path | None = Field(default=None, description="Private key of the certificate in PEM format.")

    engine: Literal["vllm", "transformers"] = Field(
        default="vllm", description="Engine that generates: `vllm`, or `transformers` as the slow reference."
    )
    max_model_len: PositiveInt = Field(
        default=2048, description="Maximum tokens of a sequence: prompt, answer and verification tag."
    )
    max_num_seqs: PositiveInt = Field(
        default=64, description="Maximum answers generated at once; further ones wait."
    )
    max_num_batched_tokens: PositiveInt = Field(
        default=2048, description="Maximum tokens computed in one step; longer prompts are split into chunks."
    )
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="Bytes of the KV cache. Without it, the engine decides."
    )
    eager: bool = Field(
        default=False, description="Skip compilation: the server starts sooner and answers more slowly."
    )

    rule: Literal["two-gates", "sdm"] | None = Field(
        default=None,
        description="What lets answers through: `two-gates`, which know the prompt and score the answer, or `sdm`, "
        "the papers' region alone. Without it, two gates where the bundle has them.",
    )
    estimator: Literal["lower", "plain"] = Field(
        default="lower",
        description="Estimator by which the papers' region admits answers: `lower` accounts for the number of "
        "calibration points behind an answer, `plain` does not.",
    )
    alpha: float | None = Field(
        default=None,
        description="Accuracy asked for where a request names none. Without it, the bundle's lowest.",
    )
    least_mode: Literal["off", "annotate", "abstain"] = Field(
        default="off",
        description="Least strict mode allowed, whatever a request asks for: `annotate` checks every answer, "
        "`abstain` also withholds every answer that is not reliable.",
    )
    certified_only: bool = Field(
        default=False,
        description="Withhold every answer that no certificate covers, whatever a request asks for, in every "
        "mode, stream and route.",
    )
    on_suspended: Literal["annotate", "abstain"] = Field(
        default="annotate",
        description="Where audits suspend a certificate: `annotate` says so beside each answer, `abstain` also lets "
        "nothing through at its alpha.",
    )
    refusal_text: str = Field(
        default="I do not know this reliably enough to answer.",
        min_length=1,
        description="Text that a client gets in place of a withheld answer.",
    )
    on_abstain: Literal["refusal", "content", "fallback"] = Field(
        default="refusal",
        description="Where a client that says nothing of it gets that text: `refusal`, or `content` for clients that "
        "drop refusals ([clients](clients.md)); `fallback` gives `CANDOR_FALLBACK_TEXT` as content.",
    )
    fallback_text: str | None = Field(
        default=None,
        min_length=1,
        description='Text in place of a withheld answer under `on_abstain: "fallback"`, for example where to '
        "find a person. Without it, such a request gets 400.",
    )
    escalate_url: str | None = Field(
        default=None,
        description="OpenAI-compatible API, up to `/v1`, that gets withheld prompts under "
        '`on_abstain: "escalate"` and whose answer the client gets. Without it, such a request gets 400.',
    )
    escalate_model: str | None = Field(default=None, description="Name of the model that is asked there.")
    escalate_key_file: Path | None = Field(
        default=None,
        description="File with the API key for it, read at each request to it. Without it, none is sent; never a "
        "client's.",
    )
    escalate_timeout_s: PositiveFloat = Field(
        default=60.0,
        description="Maximum seconds of its answer, retries included, within the request's own; beyond it, the "
        "ordinary refusal.",
    )
    escalate_retries: int = Field(
        default=2, ge=0, description="Further tries, with growing pauses, where it is away or busy."
    )
    escalate_concurrency: PositiveInt = Field(
        default=32, description="Maximum answers asked of it at once; beyond it, the ordinary refusal."
    )
    escalate_requests_per_day: PositiveInt | None = Field(
        default=None,
        description="Answers a day (UTC) asked of it for each key; beyond it, the ordinary refusal.",
    )
    escalate_tokens_per_day: PositiveInt | None = Field(
        default=None,
        description="Tokens a day (UTC) asked of it for each key, by its own count where it gives one; beyond it, "
        "the ordinary refusal.",
    )
    escalate_failures: PositiveInt = Field(
        default=5, description="Failures in a row after which it is left alone."
    )
    escalate_pause_s: PositiveFloat = Field(
        default=30.0, description="Seconds that it is then left alone before one request tries it again."
    )
    scoring_timeout_s: PositiveFloat = Field(
        10.0, description="Maximum seconds to score an answer; beyond it, the region is `unavailable`."
    )

    max_connections: PositiveInt = Field(
        default=1024, description="Maximum open connections; beyond it, 503. Open files may allow fewer."
    )
    max_connections_per_address: PositiveInt = Field(
        default=512, description="Maximum open connections from one address; beyond it, 503."
    )
    max_body_bytes: PositiveInt = Field(
        default=1 << 20, description="Maximum bytes of a request body; beyond it, 413."
    )
    max_prompt_tokens: PositiveInt | None = Field(
        default=None, description="Maximum tokens of a prompt. Without it, what the model holds."
    )
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="Maximum value of `max_tokens`. Without it, what the model holds."
    )
    max_choices: PositiveInt = Field(
        default=16, description="Maximum answers of one request: `n` times its prompts."
    )
    max_exemplars: int = Field(
        default=10,
        ge=0,
        description="Maximum exemplars shown with an answer; 0 keeps the calibration's texts private.",
    )
    max_in_flight: PositiveInt = Field(
        default=256,
        description="Maximum answers in flight, running or waiting; beyond it, 503 with Retry-After.",
    )
    max_in_flight_tokens: PositiveInt = Field(
        default=1 << 19,
        description="Maximum tokens in flight, prompts and longest answers; beyond it, 503 with Retry-After.",
    )
    requests_per_minute: PositiveInt | None = Field(
        default=None,
        description="Requests for answers per minute for each key; beyond it, 429 with Retry-After.",
    )
    tokens_per_minute: PositiveInt | None = Field(
        default=None,
        description="Tokens per minute for each key, prompts and longest answers; beyond it, 429 with "
        "Retry-After.",
    )
    request_timeout_s: PositiveFloat = Field(
        600.0,
        description="Maximum seconds of a request, waiting included; beyond it, 503. The header "
        "`x-request-timeout` asks for fewer.",
    )

    store: str | None = Field(
        default=None,
        description="Store of verdicts and labels: an SQLite file, or the URL of a PostgreSQL database, through "
        "which several replicas agree. Without it, the server takes no feedback and no certificate is watched.",
    )
    store_spool: Path | None = Field(
        default=None,
        description="File on this machine's disk for what comes while the store cannot be written. Without it, "
        "beside the SQLite file; PostgreSQL needs one.",
    )
    store_spool_bytes: PositiveInt = Field(
        default=1 << 28, description="Maximum bytes of the spool; beyond it, feedback gets 503."
    )
    store_verdicts: PositiveInt = Field(
        default=1_000_000,
        description="Verdicts kept in the store; beyond it, the oldest go that were neither drawn for an audit nor "
        "labelled.",
    )
    keep_texts: Literal["none", "drawn", "all"] = Field(
        default="none",
        description="Answers whose conversation and text the store keeps: `none`, those `drawn` for an audit, or "
        "`all`.",
    )
    keep_states: Literal["none", "drawn", "all"] = Field(
        default="none", description="Answers whose states (h and the prompt's) the store keeps, likewise."
    )
    keep_days: PositiveFloat = Field(
        default=30.0, description="Days after which kept texts, states and comments are deleted."
    )
    audit_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of answers drawn for an audit, whose labels watch the certificates.",
    )
    audit_by: Literal["share", "doubt"] = Field(
        default="share",
        description="Probability with which an answer is drawn: `share` for all alike, or by `doubt`, more often "
        "where its own probability is less sure.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Format of the log: `text` for people, `json` for one object per line."
    )
    log_bodies: bool = Field(
        default=False, description="Log the bodies of requests and responses, prompts and answers included."
    )

    engine_check_interval_s: PositiveFloat = Field(
        1.0, description="Seconds between two checks of the engine's health."
    )
    engine_stall_timeout_s: PositiveFloat = Field(
        120.0,
        description="Seconds without a token, while a request waits, before the engine is asked for one; "
        "after as long again without it, the server ends with code 1.",
    )
    shutdown_delay_s: float = Field(
        default=5.0,
        ge=0,
        description="Seconds after SIGTERM in which the server still takes requests while `/readyz` fails, so that "
        "load balancers send them elsewhere. SIGINT ends at once.",
    )
    drain_timeout_s: PositiveInt = Field(
        default=30, description="Seconds that running answers get after that."
    )

    def model_names(self, bundle: str) -> tuple[str, ...]:
        """Returns the names of the model that was calibrated as `bundle`; the first is the one shown."""
        return self.served_model_name or (bundle,)

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names that requests may use, as `host` headers have them, without port; None allows all."""
        local = self.keys is None and not self.open_to_all and self.host in LOOPBACK
        names = self.allowed_hosts or (LOOPBACK if local else ("*",))
        if "*" in names:
            return None
        return frozenset(f"[{name}]" if ":" in name and "[" not in name else name.lower() for name in names)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_choices > self.max_in_flight:
            raise ValueError(
                f"max_choices ({self.max_choices}) must not exceed max_in_flight ({self.max_in_flight}): "
                "such a request could never be let in"
            )
        if self.on_abstain == "fallback" and self.fallback_text is None:
            raise ValueError("on_abstain is fallback, so set fallback_text to the text that is shown")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if (self.escalate_url is None) != (self.escalate_model is None):
            raise ValueError("escalate_url and escalate_model go together: give both or neither")
        return self
