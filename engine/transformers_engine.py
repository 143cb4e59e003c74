"""The transformers engine: the numerical reference, and the engine for machines without vLLM.

It is simple on purpose: it computes one sequence at a time, token by token, in its own thread. Its results follow
the definitions directly, so the contract tests compare the vLLM engine with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

from candor.engine.answer import AnswerText
from candor.engine.base import (
    AdapterIdentity,
    Delta,
    EngineError,
    Generation,
    HiddenSummary,
    PromptReading,
    PromptStates,
    Sampling,
    TokenLogprob,
)
from candor.engine.evidence import TOP, from_logprobs
from candor.engine.identity import as_before, identify
from candor.engine.prompt import ChatFormat
from candor.engine.room import require_fit, room_for_answer
from candor.engine.settings import EngineSettings

T = TypeVar("T")


class TransformersEngine:
    """See `engine.base.Engine`."""

    def __init__(self, settings: EngineSettings, chat: ChatFormat) -> None:
        if settings.adapters:
            raise EngineError(
                "adapters need the engine vllm; merge one into its model to serve it with transformers"
            )
        self.representation = settings.representation
        self.adapter: AdapterIdentity | None = None
        self.max_model_len = settings.max_model_len
        self.identity = identify(settings.model, chat, settings.dtype, settings.max_model_len)
        self.earlier_identity = as_before(self.identity, settings.model)
        self._chat = chat
        self._closing_ids, self._tag_ids = chat.closing(settings.representation.tag)
        self._model = _load(settings)
        self._end_ids = chat.end_ids
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        if sampling.grammar is not None:
            raise EngineError("answers are held to a grammar by vLLM alone; use --engine vllm")
        room = room_for_answer(len(prompt_ids), len(self._closing_ids), self.max_model_len)
        fitting = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        steps = self._steps(prompt_ids, fitting, capture, prompt_states)
        try:
            while (item := await self._run(lambda: next(steps, None))) is not None:
                yield item
        finally:
            await self._run(steps.close)

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        total = len(prompt_ids) + len(response_ids) + len(self._closing_ids)
        require_fit(total, self.max_model_len)
        return await self._run(lambda: self._summarise(prompt_ids, response_ids))

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        require_fit(len(prompt_ids), self.max_model_len)
        return await self._run(lambda: self._prompt_states(prompt_ids))

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        require_fit(len(prompt_ids) + 1, self.max_model_len)
        return await self._run(lambda: self._read_prompt(prompt_ids, token_ids))

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _steps(
        self, prompt_ids: Sequence[int], sampling: Sampling, capture: bool, prompt_states: bool
    ) -> Generator[PromptStates | Delta | Generation, None, None]:
        answer = AnswerText(self.representation.tag, self._tag_ids, sampling.logprobs is not None)
        draw = _Draw(sampling)
        sequence = _Sequence(self._model)
        logits = sequence.feed(prompt_ids)[-1]
        prompt = sequence.prompt_states() if prompt_states else None
        if prompt is not None:
            yield prompt
        text, stopped, shown = "", False, 0
        unsure = max(map(len, sampling.stop), default=1) - 1  # last characters that may begin a stop string
        while len(answer.token_ids) < sampling.max_tokens:
            token = draw(logits, answer.token_ids)
            entry = self._token_logprob(logits, token, max(TOP, sampling.logprobs or 0))
            ended = token in self._end_ids
            before, text = text, self._settled(answer.token_ids if ended else [*answer.token_ids, token])
            entry = replace(
                entry, token=text[len(before) :]
            )  # the text it adds; part of a character adds none
            cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=None)
            stopped = cut is not None
            sure = max(shown, len(text) - unsure if cut is None else cut)
            if delta := answer.add(text[shown:sure], [token], [entry]):
                yield delta
            shown = sure
            if ended or stopped:
                break
            logits = sequence.feed([token])[-1]
            if answer.token_ids[-len(self._tag_ids) :] == self._tag_ids:
                break
        if not stopped and (delta := answer.add(text[shown:], [])):
            yield delta
        cut = not (ended or stopped or answer.tag_found)
        length = answer.length(self._chat.is_blank, cut=cut)
        if delta := answer.finish(length, stopped=stopped, cut=cut):
            yield delta

        tagged_as_taught = answer.token_ids[-len(self._tag_ids) :] == self._tag_ids
        token_ids = (
            answer.token_ids[:length] if length is not None else self._chat.encode_response(answer.text)
        )
        hidden = None
        if capture and tagged_as_taught and not stopped:
            hidden = sequence.summary(from_logprobs(self.representation.evidence, answer.logprobs[:length]))
        elif capture:
            hidden = self._summarise(prompt_ids, token_ids)
        yield Generation(
            text=answer.text,
            token_ids=tuple(token_ids),
            finish_reason="stop" if ended or stopped or answer.tag_found else "length",
            tagged=answer.tag_found,
            truncated=not (ended or answer.tag_found),
            hidden=hidden,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(answer.token_ids),
            logprobs=answer.reported_logprobs,
            prompt=prompt,
        )

    def _summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        sequence = _Sequence(self._model)
        logits = sequence.feed([*prompt_ids, *response_ids], keep=len(response_ids) + 1)
        sequence.feed(self._closing_ids)
        logprobs = [
            self._token_logprob(row, token, TOP) for row, token in zip(logits, response_ids, strict=False)
        ]
        return sequence.summary(from_logprobs(self.representation.evidence, logprobs))

    def _prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        sequence = _Sequence(self._model)
        sequence.feed(prompt_ids)
        return sequence.prompt_states()

    def _read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        sequence = _Sequence(self._model)
        logprobs = torch.log_softmax(sequence.feed(prompt_ids)[-1], dim=-1)
        return PromptReading(sequence.prompt_states(), tuple(logprobs[list(token_ids)].tolist()))

    def _settled(self, ids: Sequence[int]) -> str:
        """The text so far, without a last character whose bytes are incomplete."""
        return self._chat.decode(ids).rstrip("\ufffd")

    def _token_logprob(self, logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(count)
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenLogprob(
            token,
            self._chat.decode([token]),
            float(logprobs[token]),
            tuple((i, self._chat.decode([i]), p) for i, p in top),
        )


def _load(settings: EngineSettings) -> Any:
    """Loads the model (the text part of a multimodal one) so that it computes as its makers and vLLM do.

    transformers' defaults differ from both in three places (`python -m benchmarks.zoo`).
    """
    transformers_logging.disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(str(settings.model), **where)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if "long_factor" in rope and settings.max_model_len > rope["original_max_position_embeddings"]:
        rope["short_factor"] = rope["long_factor"]  # vLLM uses it for every sequence, if for any
    if text.model_type == "cohere2":
        # A window of n is n tokens besides the query's own; transformers includes that one in n.
        text.sliding_window += 1
    if getattr(text, "attn_logit_softcapping", None):
        where["attn_implementation"] = "eager"  # transformers' default omits the soft cap (Gemma 2)
    sees = "ConditionalGeneration" in (config.architectures or [""])[0]
    loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return loader.from_pretrained(
        str(settings.model), config=config, dtype=getattr(torch, settings.dtype), **where
    ).eval()


class _Sequence:
    """A sequence in progress: the running sum of its final normed states, and the last of them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._sum = self._last = torch.zeros(())  # until the first are there
        self._positions = 0

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """Returns logits (keep, V) float32 after each of the last `keep` of `ids`."""
        out = self._model(
            torch.tensor([list(ids)]),
            past_key_values=self._cache,
            output_hidden_states=True,
            logits_to_keep=keep,
        )
        states = out.hidden_states[-1][0].float()  # (len(ids), H), after the final norm
        self._sum = self._sum + states.sum(0)
        self._last = states[-1].clone()
        self._positions += len(ids)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def summary(self, evidence: torch.Tensor) -> HiddenSummary:
        return HiddenSummary(self._sum / self._positions, self._last, evidence, self._positions, True)

    def prompt_states(self) -> PromptStates:
        """Returns the prompt's states; call it while only the prompt has been fed."""
        return PromptStates(self._sum / self._positions, self._last, True)


GREEDY_BELOW = 1e-5
"""As in vLLM: logits divided by less may be infinite."""


class _Draw:
    """Chooses the next token: greedy at a temperature below `GREEDY_BELOW`, else sampled."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        else:
            self._generator.seed()
        warpers: list[Any] = []
        if sampling.temperature >= GREEDY_BELOW:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warp = LogitsProcessorList(warpers)

    def __call__(self, logits: torch.Tensor, so_far: Sequence[int]) -> int:
        if so_far and (self._sampling.frequency_penalty or self._sampling.presence_penalty):
            ids, counts = torch.tensor(list(so_far)).unique(return_counts=True)
            penalty = self._sampling.frequency_penalty * counts + self._sampling.presence_penalty
            logits = logits.index_add(0, ids, -penalty)
        if self._sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        warped = self._warp(torch.tensor([list(so_far)]), logits[None])
        return int(torch.multinomial(warped.softmax(-1)[0], 1, generator=self._generator))
