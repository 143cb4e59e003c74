"""The engine interface: an engine returns an answer and, from the same pass, the model's hidden states.

The estimator's input is the representation

    h = [ mean over all positions of the final normed hidden states ;
          the final normed hidden state at the declared position ;
          the generation's evidence (optional) ]

(arXiv 2510.26183, section 3). The declared position is the last token of the verification tag
that an SDM language model writes after its answer. The mean runs over every position up to and
including that one: template, prompt, answer and tag.

    EngineError
    ├── EngineDead         the engine's process ended; it answers no further requests
    ├── PromptTooLong      prompt and answer do not fit the model's context
    └── IdentityMismatch   the engine serves another model than the bundle was made for
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch

EVIDENCE = (
    "log_mean_surprisal",
    "log_sum_surprisal",
    "log_max_surprisal",
    "mean_margin",
    "min_margin",
    "log_length",
)
"""Names of the evidence features a representation may declare; each is one number over the answer's tokens."""

Part = Literal["mean", "last", "evidence"]


class EngineError(Exception):
    """An engine could not do what was asked."""


class EngineDead(EngineError):
    """The engine's process ended; only a restart helps."""


class PromptTooLong(EngineError):
    """Prompt and requested answer exceed the model's context."""


class RequestRefused(EngineError):
    """The engine never serves such a request.

    status: HTTP's, below 500 or 501. param: the field at fault. code: for programs.
    """

    def __init__(
        self, message: str, status: int, param: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class IdentityMismatch(EngineError):
    """Model, tokenizer, chat template, dtype or hidden size differ from the bundle's."""


@dataclass(frozen=True)
class Representation:
    """How h is composed. It is a field of the bundle: a layer fitted on one representation is invalid on another.

    tag: text whose last token is the declared position.
    order: the blocks of h, in this order; "evidence" is absent for the papers' h.
    evidence: names from `EVIDENCE`, in this order; empty without an evidence block.
    """

    tag: str = "<verified>"
    order: tuple[Part, ...] = ("mean", "last")
    evidence: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = get_args(Part)
        if not self.order or set(self.order) - set(parts) or len(set(self.order)) < len(self.order):
            strange = [part for part in self.order if part not in parts]
            raise ValueError(
                f"unknown parts {strange} or one twice; expected some of {list(parts)}, each once"
            )
        unknown = [name for name in self.evidence if name not in EVIDENCE]
        if unknown:
            raise ValueError(f"unknown evidence {unknown}; known are {list(EVIDENCE)}")
        if ("evidence" in self.order) != bool(self.evidence):
            raise ValueError(
                f"order {self.order} and evidence {self.evidence} disagree: "
                'name features exactly when "evidence" stands in order'
            )

    def block_sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Width of each block of h, in order; their sum is the adaptor's input dimension D."""
        width = {"mean": hidden_size, "last": hidden_size, "evidence": len(self.evidence)}
        return tuple(width[part] for part in self.order)

    def parts(self, hidden_size: int) -> tuple[tuple[str, int], ...]:
        """Name and width of each block of h, in order."""
        return tuple(zip(self.order, self.block_sizes(hidden_size), strict=True))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelIdentity:
    """Identifies the served model by content: two engines serve the same model iff their identities are equal.

    engine_options: the engine's own options under which the same weights have other states.
    """

    name: str
    architecture: str
    hidden_size: int
    dtype: str
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    engine_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterIdentity:
    """Identifies by content the weights added to the model's own when serving, for example a LoRA."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Sampling:
    """How to generate. The defaults are greedy, the policy of the demo bundle."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None  # alternatives to report per token, None: none
    grammar: str | None = (
        None  # what answers are held to, vLLM's `structured_outputs` as JSON with sorted keys
    )


@dataclass(frozen=True)
class TokenLogprob:
    """One answer token with its log-probability under the unmodified (temperature 1) model.

    token: the text it adds; "" for part of a character (the token that completes the character adds all of it).
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()  # (id, text, log-probability), best first


@dataclass(frozen=True)
class HiddenSummary:
    """The model's states over one prompt and answer, float32 on the CPU.

    mean, last: (H,). evidence: (E,) in the representation's order, (0,) without one.
    positions: number of positions the mean runs over.
    complete: whether all of them were counted. If not, the summary must not be scored.
    """

    mean: torch.Tensor
    last: torch.Tensor
    evidence: torch.Tensor
    positions: int
    complete: bool

    def vector(self, representation: Representation) -> torch.Tensor:
        """h, shape (D,): the blocks in the representation's order."""
        blocks = {"mean": self.mean, "last": self.last, "evidence": self.evidence}
        return torch.cat([blocks[part] for part in representation.order])


@dataclass(frozen=True)
class PromptStates:
    """The model's states over the prompt alone, float32 on the CPU, known before an answer's first token.

    mean: (H,), over the prompt's positions, template included. last: (H,), at the last of them.
    complete: whether all of them were counted. If not, the states must not be scored.
    """

    mean: torch.Tensor
    last: torch.Tensor
    complete: bool

    def vector(self) -> torch.Tensor:
        """[mean ; last], shape (2 H,)."""
        return torch.cat([self.mean, self.last])


@dataclass(frozen=True)
class PromptReading:
    """What one prefill tells of a prompt: its states, and the log-probabilities of some tokens to follow it.

    logprobs: under the unmodified (temperature 1) model over its whole vocabulary, in the order asked for.
    """

    states: PromptStates
    logprobs: tuple[float, ...]

    @property
    def complete(self) -> bool:
        return self.states.complete


@dataclass(frozen=True)
class Delta:
    """A piece of the answer's text, tag excluded; the pieces joined are `Generation.text`."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    text, token_ids: the answer alone, without the tag and what follows it.
    logprobs: those of all deltas, if requested. If a stop string cut the text, tokens beyond the cut have none.
    finish_reason: "stop" (tag, end of turn or stop string) or "length".
    tagged: the model wrote the tag itself; otherwise it was appended to take h.
    truncated: the answer did not end on its own (length limit or a stop string).
    hidden, prompt: None if not requested or not available.
    completion_tokens: tokens generated for the answer, tag included.
    queued_s: seconds the request waited in the engine's queue; None if the engine does not report it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    tagged: bool
    truncated: bool
    hidden: HiddenSummary | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    queued_s: float | None = None
    prompt: PromptStates | None = None


class Engine(Protocol):
    """Takes tokens and returns text and hidden states. There are two implementations: vLLM and transformers.

    earlier_identity: the same model's identity as bundle formats 1 to 3 record it (`identity.as_before`).
    adapter: the adapter added to the model's weights, or None.
    """

    identity: ModelIdentity
    earlier_identity: ModelIdentity
    adapter: AdapterIdentity | None
    representation: Representation
    max_model_len: int

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        """Yields deltas while the answer is written, then exactly one `Generation`.

        Closing the iterator early cancels the request and frees its place in the engine.
        `capture=False` answers without h.
        `prompt_states=True` yields the `PromptStates` first, at the end of prefill; closing the iterator then
        costs no more than the prefill. If the states are not available, none are yielded; the answer still is.
        Raises PromptTooLong, EngineDead or EngineError.
        """
        ...

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        """Returns the parts of h for a given prompt and response (without the tag, which is appended)."""
        ...

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        """Returns the `PromptStates` that `generate` yields first, without an answer.

        Raises PromptTooLong, EngineDead or EngineError.
        """
        ...

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        """Returns the prompt's states and the log-probabilities of each of `token_ids` as the next token.

        Costs one prefill, of which a beginning that was read before is not computed again.
        Raises PromptTooLong, EngineDead or EngineError.
        """
        ...

    async def check(self) -> None:
        """Raises EngineDead unless the engine answers."""
        ...

    async def close(self) -> None:
        """Ends every process of the engine."""
        ...
