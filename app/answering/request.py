"""Where a request's body, checked against what is served, becomes an order.

What a request leaves open is filled in from the bundle's policy, so a stock client that sets nothing gets
calibrated answers. What leaves the policy is answered all the same, but marked as uncalibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from candor.app.answering.orders import Job, Options, Order, PairOrder, Replacement
from candor.app.edge.limits import Limits, Refused, at_most
from candor.app.edge.schemas.openai import (
    INT64,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
)
from candor.app.edge.schemas.reliability import ReliabilityOptions
from candor.app.edge.schemas.scoring import ScoreRequest
from candor.app.policy import samples_as_calibrated
from candor.engine.base import PromptTooLong, Sampling

if TYPE_CHECKING:
    from candor.app.process.backend import Backend
    from candor.app.process.settings import Settings
    from candor.model_store.manifest import Manifest


class OrderDesk:
    """Turns bodies into orders for one model. Raises Refused or PromptTooLong."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        manifest = backend.bundle.manifest
        self.alphas = manifest.alphas
        self.default_alpha = default_alpha(settings.alpha, manifest.alphas)
        self._certified_only = settings.certified_only
        self._certified_alphas = certified_alphas(manifest, settings)
        self._chat = backend.chat
        self._policy = manifest.policy
        self._tag = manifest.representation.tag
        self.most_exemplars = settings.max_exemplars
        self._room = backend.engine.max_model_len
        self._limits = Limits.of(settings, backend.engine.max_model_len)
        self._refusal_text = settings.refusal_text
        self._fallback_text = settings.fallback_text

    def chat(self, body: ChatCompletionRequest) -> Order:
        prompt_ids, keeps_system_prompt = self._encode_chat(body.messages)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return self._order(
            body,
            [prompt_ids],
            max_tokens=body.max_completion_tokens or body.max_tokens,
            param="messages",
            logprobs=top,
            calibrated=keeps_system_prompt,
        )

    def completion(self, body: CompletionRequest) -> Order:
        """Plain prompts leave the chat format that was calibrated, so their answers are never calibrated."""
        prompts = [self._encode_text(text) for text in body.prompt]
        return self._order(
            body,
            prompts,
            max_tokens=body.max_tokens,
            param="prompt",
            logprobs=body.logprobs,
            calibrated=False,
        )

    def pair(self, body: ScoreRequest) -> PairOrder:
        at_most(self._limits.exemplars, body.exemplars, "exemplars", "exemplars")
        if body.messages is not None:
            prompt_ids, calibrated = self._encode_chat(body.messages)
        else:
            prompt_ids, calibrated = self._encode_text(body.prompt or ""), False
        response_ids = tuple(self._chat.encode_response(body.response))
        self._check_fit(prompt_ids, len(response_ids), "messages" if body.messages else "prompt")
        return PairOrder(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            # No answer of the served model holds its tag: that is where an answer ends.
            calibrated=calibrated
            and len(response_ids) <= self._policy.max_tokens
            and self._tag not in body.response,
            alpha=(alpha := self._alpha(body.alpha, "alpha")),
            certified=self._certified(body.certified, alpha, "certified"),
            exemplars=body.exemplars,
        )

    def _order(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int | None,
        param: str,
        logprobs: int | None,
        calibrated: bool,
    ) -> Order:
        n = body.n or 1
        at_most(self._limits.choices, n * len(prompts), "answers in one request (n times prompts)", "n")
        if max_tokens is not None:
            at_most(self._limits.output_tokens, max_tokens, "max_tokens", "max_tokens")
        sampling = self._sampling(body, logprobs)
        jobs: list[Job] = []
        for prompt_ids in prompts:
            self._check_fit(prompt_ids, max_tokens or 1, param)
            left = self._room - len(prompt_ids)
            length = max_tokens or min(self._policy.max_tokens, self._limits.output_tokens, left)
            for _ in range(n):
                jobs.append(
                    Job(
                        prompt_ids, replace(sampling, max_tokens=length, seed=_nth_seed(body.seed, len(jobs)))
                    )
                )
        calibrated = calibrated and samples_as_calibrated(self._policy, sampling)
        options = self._options(body.reliability or ReliabilityOptions(), streamed=body.wants_stream)
        return Order(
            jobs=tuple(jobs),
            prompt_tokens=sum(map(len, prompts)),
            calibrated=calibrated,
            options=options,
            attempts=self._policy.resample if calibrated and options.mode != "off" else 1,
        )

    def _sampling(self, body: GenerationRequest, logprobs: int | None) -> Sampling:
        policy = self._policy
        return Sampling(
            temperature=policy.temperature if body.temperature is None else body.temperature,
            top_p=policy.top_p if body.top_p is None else body.top_p,
            top_k=policy.top_k if body.top_k is None else max(body.top_k, 0),
            stop=tuple(body.stop or ()),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logprobs=logprobs,
        )

    def _options(self, asked: ReliabilityOptions, *, streamed: bool) -> Options:
        at_most(self._limits.exemplars, asked.exemplars, "exemplars", "reliability.exemplars")
        withholds = asked.mode == "abstain"
        by_default = "buffered" if withholds else "optimistic"
        alpha = self._alpha(asked.alpha, "reliability.alpha")
        return Options(
            mode=asked.mode,
            alpha=alpha,
            certified=self._certified(asked.certified, alpha, "reliability.certified"),
            buffered=streamed and (asked.stream or by_default) == "buffered",
            exemplars=asked.exemplars,
            replacement=self._replacement(asked) if withholds else None,
        )

    def _replacement(self, asked: ReliabilityOptions) -> Replacement:
        if asked.on_abstain != "fallback":
            return Replacement(self._refusal_text, as_refusal=asked.on_abstain == "refusal")
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
        """Whether only certified answers count: where the server or the request says so."""
        wanted = self._certified_only or bool(asked)
        if wanted:
            _require_certified(alpha, self._certified_alphas, param)
        return wanted

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[tuple[int, ...], bool]:
        """The prompt's ids, and whether it has the system prompt that was calibrated."""
        turns = [message.to_template() for message in messages]
        wanted = self._policy.system_prompt  # None: the calibration's records brought their own
        systems = [position for position, turn in enumerate(turns) if turn["role"] == "system"]
        if wanted is not None and not systems:
            turns, systems = [{"role": "system", "content": wanted}, *turns], [0]
        try:
            ids = self._chat.encode_chat(turns)
        except ValueError as error:
            raise Refused(str(error), "messages") from error
        return tuple(ids), wanted is None or (systems == [0] and turns[0]["content"] == wanted)

    def _encode_text(self, text: str) -> tuple[int, ...]:
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
        at_most(self._limits.prompt_tokens, len(prompt_ids), "prompt tokens", param)


def default_alpha(wanted: float | None, alphas: Sequence[float]) -> float:
    """What requests that name none are judged at: the operator's, or the lowest of the bundle's ascending.

    Raises Refused where the bundle does not have the operator's.
    """
    return alphas[0] if wanted is None else _calibrated(wanted, alphas, "CANDOR_ALPHA")


def certified_alphas(manifest: Manifest, settings: Settings) -> list[float]:
    """Where answers are certified under the operator's estimator.

    Raises Refused where only certified answers count and the default alpha has no certificate.
    """
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


def _nth_seed(seed: int | None, n: int) -> int | None:
    """Choices of one seeded request differ, and are the same when asked for again."""
    return None if seed is None else (seed + n + INT64) % (2 * INT64) - INT64
