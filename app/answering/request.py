"""Resolves a request's body against the served bundle: the engine's input, and what happens to the answer.

The bundle's policy fills in what a request leaves open, so a stock client that sets nothing gets calibrated answers.
A request that departs from the policy (`candor.policy`) is answered too, but its answer is not called calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from candor.app.answering.waiting import Deadline
from candor.app.edge.limits import Limits, Refused, at_most, few_logprobs
from candor.app.edge.schemas.reliability import ReliabilityOptions
from candor.app.edge.schemas.requests import (
    INT64,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
)
from candor.app.edge.schemas.scoring import ScoreRequest
from candor.engine.base import PromptTooLong, Sampling
from candor.policy.conversation import Conversation, Turn
from candor.policy.upstream import Asked

if TYPE_CHECKING:
    from candor.app.process.backend import Backend
    from candor.app.process.settings import Settings
    from candor.model_store.bundle import Bundle
    from candor.policy.judging import TwoGates

Mode = Literal["annotate", "abstain", "off"]

_STRICTNESS: dict[Mode, int] = {"off": 0, "annotate": 1, "abstain": 2}

_MOST_LOGPROBS = 1 << 16
"""Of one request; their JSON is made in one go."""

_BEGINNINGS = (2, 8)
"""Characters per token of the context, of the beginnings that are tokenised first."""
_AROUND = 1 << 16
"""Characters of a body that are not its texts: fields, schemas, tools."""
_SLACK = 64  # a text cut in the middle of a word has some other tokens there

_APART = 2**32
"""Step between the seeds of one choice's attempts, so that they never equal those of another choice."""


@dataclass(frozen=True)
class Replacement:
    """The text that a client gets in place of a withheld answer."""

    text: str
    as_refusal: bool


@dataclass(frozen=True)
class Reliability:
    """A request's resolved reliability options. replacement: None if nothing is withheld.

    certified_only: whether to abstain from answers that no certificate covers. buffered: whether a stream holds its
    text back until the decision. escalates: whether another model is asked for what is withheld.
    """

    mode: Mode
    alpha: float
    certified_only: bool
    buffered: bool
    exemplars: int
    replacement: Replacement | None
    escalates: bool = False


@dataclass(frozen=True)
class Choice:
    """The engine's input for one answer. asked: the same as text, with the system prompt."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    asked: Asked = ()

    def attempt(self, number: int) -> Choice:
        """Returns the choice for attempt `number`, from 0. Attempts differ; with a seed, they are reproducible."""
        seed = self.sampling.seed
        if seed is None or number == 0:
            return self
        return replace(self, sampling=replace(self.sampling, seed=_wrapped(seed + number * _APART)))


@dataclass(frozen=True)
class AnswerRequest:
    """A resolved request. choices: in index order. prompt_tokens: each prompt counted once.

    calibrated: whether the request keeps to the policy, as far as that is known before the answer.
    attempts: maximum answers written for one choice until one is reliable; 1 outside the policy.
    caller: whose places the request takes. streamed: whether the client gets pieces. deadline: of an escalation.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    calibrated: bool
    reliability: Reliability
    attempts: int = 1
    caller: str = "anyone"
    streamed: bool = False
    deadline: Deadline | None = None

    @property
    def tokens(self) -> int:
        """Maximum tokens of the request: for each choice, its prompt and its longest answer."""
        return sum(len(choice.prompt_ids) + choice.sampling.max_tokens for choice in self.choices)


@dataclass(frozen=True)
class PairRequest:
    """A given prompt and response to score."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    calibrated: bool
    alpha: float
    certified_only: bool
    exemplars: int
    caller: str = "anyone"

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Bulk(NamedTuple):
    """What is known of a request before its texts are tokenised."""

    choices: int
    characters: int


class RequestResolver:
    """Resolves bodies for one model. Raises Refused or PromptTooLong."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        manifest = backend.bundle.manifest
        self.alphas = manifest.alphas
        self.default_alpha = default_alpha(settings.alpha, manifest.alphas)
        self.most_exemplars = settings.max_exemplars
        self._certified_only = settings.certified_only
        self._certified_alphas = certified_alphas(backend.bundle, settings)
        self._least_mode: Mode = "abstain" if settings.certified_only else settings.least_mode
        self._chat = backend.chat
        self._policy = manifest.policy
        self._tag = manifest.representation.tag
        self._room = backend.engine.max_model_len
        self.limits = Limits.of(settings, backend.engine.max_model_len)
        self._refusal_text = settings.refusal_text
        self._on_abstain = settings.on_abstain
        self._fallback_text = settings.fallback_text
        self._escalates = settings.escalate_url is not None

    def measure(self, body: ChatCompletionRequest | CompletionRequest | ScoreRequest) -> Bulk:
        """Returns what a body asks for, and refuses what its counts and lengths alone forbid.

        The other methods take time that grows with this number: call them off the event loop.
        """
        prompts, choices = 1, 1
        if isinstance(body, CompletionRequest):
            texts, param, prompts = list(body.prompt), "prompt", len(body.prompt)
        elif body.messages is not None:
            texts, param = [message.to_template()["content"] for message in body.messages], "messages"
        else:
            texts, param = [body.prompt or ""], "prompt"
        if isinstance(body, ScoreRequest):
            texts.append(body.response)
        else:
            choices = (body.n or 1) * prompts
            at_most(self.limits.choices, choices, "answers in one request (n times prompts)", "n")
        characters, longest = sum(map(len, texts)), self._chat.longest_token
        if characters > prompts * longest * self._room:
            raise PromptTooLong(
                f"this model's maximum context length is {self._room} tokens, of at most {longest} characters each; "
                f"{param} has {characters} characters: shorten it"
            )
        return Bulk(choices, characters)

    def chat(self, body: ChatCompletionRequest) -> AnswerRequest:
        conversation, prompt_ids = self._encode_chat(body.messages, body.chat_template_kwargs)
        return self._answers(
            body,
            [(prompt_ids, conversation.turns)],
            max_tokens=body.max_completion_tokens or body.max_tokens,
            param="messages",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            calibrated=conversation.departure is None,
        )

    def completion(self, body: CompletionRequest) -> AnswerRequest:
        """Resolves plain prompts. They lack the calibrated chat format, so their answers are never calibrated."""
        prompts = [(self._encode_text(text), text) for text in body.prompt]
        return self._answers(
            body,
            prompts,
            max_tokens=body.max_tokens,
            param="prompt",
            logprobs=body.logprobs,
            calibrated=False,
        )

    def within(self, bulk: Bulk, prompts: int) -> Bulk:
        """Returns it, or raises PromptTooLong if not even the longest tokens could make it fit."""
        longest = self._chat.longest_token
        if bulk.characters > prompts * longest * self._room + _AROUND:
            raise PromptTooLong(
                f"this model's maximum context length is {self._room} tokens, of at most {longest} characters each; "
                f"the body has {bulk.characters}: shorten it"
            )
        return bulk

    def check_sizes(self, max_tokens: int, choices: int) -> None:
        """Raises Refused for more tokens of an answer, or more answers, than this server allows."""
        at_most(self.limits.output_tokens, max_tokens, "max_tokens", "max_tokens")
        at_most(self.limits.choices, choices, "answers in one request (n times prompts)", "n")

    def encode(
        self, turns: Sequence[Turn], template_arguments: Mapping[str, Any] | None
    ) -> tuple[list[int], bool]:
        """Returns a conversation's token ids, and whether calibration covered such conversations."""
        conversation, ids = self._encoded(turns, template_arguments)
        return ids, conversation.departure is None

    def _encoded(
        self, turns: Sequence[Turn], template_arguments: Mapping[str, Any] | None
    ) -> tuple[Conversation, list[int]]:
        for turn in turns:
            self._check_beginning(turn["content"], "messages")
        conversation = self._policy.conversations.resolve(turns, template_arguments)
        try:
            return conversation, conversation.encode(self._chat)
        except ValueError as error:
            raise Refused(str(error), "messages") from error

    def pair(self, body: ScoreRequest) -> PairRequest:
        at_most(self.limits.exemplars, body.exemplars, "exemplars", "exemplars")
        if body.messages is not None:
            conversation, prompt_ids = self._encode_chat(body.messages)
            calibrated = conversation.departure is None
        else:
            prompt_ids, calibrated = self._encode_text(body.prompt or ""), False
        response_ids = tuple(self._chat.encode_response(body.response))
        self._check_fit(prompt_ids, len(response_ids), "messages" if body.messages else "prompt")
        departure = self._policy.given(body.response, response_ids, self._tag)
        alpha = self._alpha(body.alpha, "alpha")
        return PairRequest(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            calibrated=calibrated and departure is None,
            alpha=alpha,
            certified_only=self._certified(body.certified, alpha, "certified"),
            exemplars=body.exemplars,
        )

    def _answers(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[tuple[int, ...], Asked]],
        *,
        max_tokens: int | None,
        param: str,
        logprobs: int | None,
        calibrated: bool,
    ) -> AnswerRequest:
        n = body.n or 1
        if max_tokens is not None:
            at_most(self.limits.output_tokens, max_tokens, "max_tokens", "max_tokens")
        sampling = self._policy.sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=None if body.top_k is None else max(body.top_k, 0),
            stop=tuple(body.stop or ()),
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            logprobs=logprobs,
        )
        if body.response_format is not None:  # text, in so many words
            sampling = replace(sampling, grammar=None)
        choices: list[Choice] = []
        for prompt_ids, asked in prompts:
            self._check_fit(prompt_ids, max_tokens or 1, param)
            left = self._room - len(prompt_ids)
            length = max_tokens or min(self._policy.max_tokens, self.limits.output_tokens, left)
            for _ in range(n):
                seed = None if body.seed is None else _wrapped(body.seed + len(choices))  # one seed a choice
                choices.append(Choice(prompt_ids, replace(sampling, max_tokens=length, seed=seed), asked))
        if logprobs is not None:
            few_logprobs(_MOST_LOGPROBS, 1 + logprobs, sum(one.sampling.max_tokens for one in choices))
        calibrated = calibrated and self._policy.draws(sampling)
        reliability = self.resolve_reliability(
            body.reliability or ReliabilityOptions(), streamed=body.wants_stream
        )
        return AnswerRequest(
            choices=tuple(choices),
            prompt_tokens=sum(len(ids) for ids, _ in prompts),
            calibrated=calibrated,
            reliability=reliability,
            attempts=self._policy.resample if calibrated and reliability.mode != "off" else 1,
            streamed=body.wants_stream,
        )

    @staticmethod
    def unjudged(reliability: Reliability) -> Reliability:
        """Returns the options of a request that has nothing written."""
        return replace(reliability, mode="off", buffered=False, replacement=None)

    def resolve_reliability(self, asked: ReliabilityOptions, *, streamed: bool) -> Reliability:
        """Takes the stricter of the operator's and the request's mode. The operator's abstain buffers all streams."""
        at_most(self.limits.exemplars, asked.exemplars, "exemplars", "reliability.exemplars")
        mode = max(asked.mode, self._least_mode, key=_STRICTNESS.__getitem__)
        withholds = mode == "abstain"
        stream = asked.stream or ("buffered" if withholds else "optimistic")
        alpha = self._alpha(asked.alpha, "reliability.alpha")
        return Reliability(
            mode=mode,
            alpha=alpha,
            certified_only=self._certified(asked.certified, alpha, "reliability.certified"),
            buffered=streamed and (stream == "buffered" or self._least_mode == "abstain"),
            exemplars=asked.exemplars,
            replacement=self._replacement(asked) if withholds else None,
            escalates=withholds and asked.on_abstain == "escalate",
        )

    def _replacement(self, asked: ReliabilityOptions) -> Replacement:
        if asked.on_abstain == "escalate" and not self._escalates:
            raise Refused(
                'this server has no other model to ask; use "refusal" or "content", or have its operator set '
                "CANDOR_ESCALATE_URL",
                "reliability.on_abstain",
            )
        where = asked.on_abstain or self._on_abstain
        if where != "fallback":
            return Replacement(self._refusal_text, as_refusal=where != "content")
        if self._fallback_text is None:
            raise Refused(
                'this server has no fallback answer; use "refusal" or "content", or have its operator set '
                "CANDOR_FALLBACK_TEXT",
                "reliability.on_abstain",
            )
        return Replacement(self._fallback_text, as_refusal=False)

    def _alpha(self, asked: float | None, param: str) -> float:
        return self.default_alpha if asked is None else _calibrated(asked, self.alphas, param)

    def _certified(self, asked: bool | None, alpha: float, param: str) -> bool:
        """Returns whether only certified answers count, because the server or the request says so."""
        wanted = self._certified_only or bool(asked)
        if wanted:
            _require_certified(alpha, self._certified_alphas, param)
        return wanted

    def _encode_chat(
        self, messages: Sequence[ChatMessage], template_arguments: dict[str, Any] | None = None
    ) -> tuple[Conversation, tuple[int, ...]]:
        """Returns the conversation as the model gets it, and its token ids."""
        conversation, ids = self._encoded([message.to_template() for message in messages], template_arguments)
        return conversation, tuple(ids)

    def _check_beginning(self, text: str, param: str) -> None:
        """Refuses a text whose beginning alone has more tokens than fit, without tokenising the rest.

        Making a list of a text's tokens holds the whole process for as long as it has tokens.
        """
        for letters in _BEGINNINGS:
            if len(text) <= letters * self._room:
                return
            tokens = len(self._chat.encode_text(text[: letters * self._room]))
            if tokens > self._room + _SLACK:
                raise PromptTooLong(
                    f"this model's maximum context length is {self._room} tokens; the first "
                    f"{letters * self._room} characters of {param} alone have {tokens}: shorten it"
                )

    def _encode_text(self, text: str) -> tuple[int, ...]:
        self._check_beginning(text, "prompt")
        ids = tuple(self._chat.encode_text(text))
        if not ids:
            raise Refused("expected a prompt with at least one token, got an empty one", "prompt")
        return ids

    def _check_fit(self, prompt_ids: Sequence[int], answer_tokens: int, param: str) -> None:
        if len(prompt_ids) + answer_tokens > self._room:
            raise PromptTooLong(
                f"this model's maximum context length is {self._room} tokens; the prompt has "
                f"{len(prompt_ids)} and the answer needs {answer_tokens}: shorten one of them"
            )
        at_most(self.limits.prompt_tokens, len(prompt_ids), "prompt tokens", param)


def default_alpha(wanted: float | None, alphas: Sequence[float]) -> float:
    """Returns the alpha of requests that name none: the operator's, else the lowest. alphas: ascending.

    Raises Refused if the bundle does not have the operator's alpha.
    """
    return alphas[0] if wanted is None else _calibrated(wanted, alphas, "CANDOR_ALPHA")


def gates_of(bundle: Bundle, settings: Settings) -> TwoGates | None:
    """Returns the bundle's two gates if they judge, as the operator says; None if its regions do.

    Raises Refused if the operator wants two gates and the bundle has none.
    """
    if settings.rule == "two-gates" and bundle.rule is None:
        raise Refused(
            "CANDOR_RULE: expected a bundle with two gates, and this one has the papers' regions only; make one with "
            "candor calibrate --rule two-gates, or serve with sdm",
            "CANDOR_RULE",
        )
    return None if settings.rule == "sdm" else bundle.rule


def certified_alphas(bundle: Bundle, settings: Settings) -> list[float]:
    """Returns the alphas that have a certificate of the two gates, or of the regions under the operator's estimator.

    Raises Refused if only certified answers count and the default alpha has no certificate.
    """
    manifest, gates = bundle.manifest, gates_of(bundle, settings)
    if gates is not None:
        found = [one.alpha for one in gates.terms.certificates]
    else:
        found = [one.alpha for one in manifest.certificates if one.estimator == settings.estimator]
    if settings.certified_only:
        _require_certified(default_alpha(settings.alpha, manifest.alphas), found, "CANDOR_CERTIFIED_ONLY")
    return found


def _require_certified(alpha: float, certified: Sequence[float], param: str) -> None:
    if alpha not in certified:
        known = ", ".join(map(str, certified)) or "none"
        raise Refused(
            f"{param}: expected an alpha at which the bundle has a certificate ({known}), got {alpha}; "
            "make one with candor calibrate --certify",
            param,
        )


def _calibrated(alpha: float, alphas: Sequence[float], param: str) -> float:
    if alpha not in alphas:
        known = ", ".join(map(str, alphas))
        raise Refused(
            f"{param}: expected an alpha the bundle was calibrated at ({known}), got {alpha}", param
        )
    return alpha


def _wrapped(seed: int) -> int:
    """Wraps the seed into the signed 64-bit range."""
    return (seed + INT64) % (2 * INT64) - INT64
