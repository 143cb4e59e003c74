"""The engine that serves: vLLM, with the hidden state taken in the pass that writes the answer.

With vllm_scheduler.py and the worker files, the only place that names vllm. This side runs in the API process:
it turns a request into vLLM's terms, cuts the tag off what comes back and puts the summary together.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from engine.answer import Answer
from engine.base import (
    Delta,
    EngineDead,
    EngineError,
    Generation,
    HiddenSummary,
    Sampling,
    TokenLogprob,
)
from engine.evidence import TOP, from_logprobs
from engine.factory import EngineSettings
from engine.identity import identify
from engine.prompt import SEPARATOR, ChatFormat
from engine.room import require_fit, room_for_answer
from engine.vllm_scheduler import KEY

logger = logging.getLogger("candor")

_Logprobs = Mapping[int, Any]
"""vLLM's: token id -> Logprob (logprob, rank, decoded_token), the token itself and the likeliest ones."""


class VLLMEngine:
    """See `engine.base.Engine`."""

    def __init__(self, settings: EngineSettings, chat: ChatFormat) -> None:
        self.representation = settings.representation
        self.max_model_len = settings.max_model_len
        self.identity = identify(settings.model, chat, settings.dtype)
        self._chat = chat
        self._tag_ids = chat.encode_response(settings.representation.tag)
        self._closing_ids = chat.encode_response(SEPARATOR + settings.representation.tag)
        try:
            self._llm = AsyncLLM.from_engine_args(_engine_args(settings))
        except Exception as error:  # whatever it is, the server has one message for it
            raise EngineError(f"vLLM did not start: {error}; its log above says more") from error

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, capture: bool = True
    ) -> AsyncGenerator[Delta | Generation, None]:
        params = self._params(prompt_ids, sampling, capture)
        answer = Answer(self.representation.tag, self._tag_ids, sampling.logprobs is not None)
        async with aclosing(self._submit(prompt_ids, params)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                logprobs = [
                    _token_logprob(token_id, entry)
                    for token_id, entry in zip(completion.token_ids, completion.logprobs or (), strict=False)
                ]
                if delta := answer.add(completion.text, completion.token_ids, logprobs):
                    yield delta
        if delta := answer.finish():
            yield delta

        record = (output.kv_transfer_params or {}).get(KEY)
        length = answer.length(self._chat.is_blank)
        hidden = None
        if capture:
            try:
                hidden = await self._hidden(prompt_ids, answer, length, record)
            except EngineDead:
                raise
            except EngineError as error:  # the answer is there all the same; it cannot be checked
                logger.warning("no hidden state for an answer: %s", error)
        ended = answer.tag_found or (completion.finish_reason == "stop" and completion.stop_reason is None)
        token_ids = (
            answer.token_ids[:length] if length is not None else self._chat.encode_response(answer.text)
        )
        yield Generation(
            text=answer.text,
            token_ids=tuple(token_ids),
            finish_reason="stop" if answer.tag_found or completion.finish_reason == "stop" else "length",
            tagged=answer.tag_found,
            truncated=not ended,
            hidden=hidden,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(answer.token_ids) - (record is not None),  # without the one after the tag
            logprobs=tuple(answer.logprobs[:length]) if sampling.logprobs is not None else (),
            queued_s=_queued(output),
        )

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        return await self._summarise(prompt_ids, response_ids, None)

    async def check(self) -> None:
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process ended; see its log above") from error

    async def close(self) -> None:
        self._llm.shutdown()

    async def _hidden(
        self, prompt_ids: Sequence[int], answer: Answer, length: int | None, record: Any
    ) -> HiddenSummary:
        """h's parts for a finished answer: as reported at its tag, else by appending the tag to it.

        The second way is one more request, whose sequence lies in the prefix cache but for its last block.
        """
        if length is None:  # the tag came in other tokens than its own: score the text as it reads
            return await self._summarise(prompt_ids, self._chat.encode_response(answer.text), None)
        known = from_logprobs(self.representation.evidence, answer.logprobs[:length])
        if record is not None and record[1]:
            return _summary(record, known)
        return await self._summarise(prompt_ids, answer.token_ids[:length], known)

    async def _summarise(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], known: torch.Tensor | None
    ) -> HiddenSummary:
        """One request over prompt, response and tag; `known` is the evidence where it was taken before."""
        ids = [*prompt_ids, *response_ids, *self._closing_ids]
        require_fit(len(ids), self.max_model_len)
        ask = self.representation.evidence and known is None
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=TOP if ask else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={KEY: {"tag": self._tag_ids, "given": True}},
        )
        record = None
        for skip_cache in (params.skip_reading_prefix_cache, True):
            params.skip_reading_prefix_cache = skip_cache
            output = [output async for output in self._submit(ids, params)][-1]
            record = (output.kv_transfer_params or {}).get(KEY)
            if record is not None and record[1]:
                break
        if known is None:
            entries = (output.prompt_logprobs or ())[len(prompt_ids) :][: len(response_ids)]
            scored = [_token_logprob(i, e) for i, e in zip(response_ids, entries, strict=False)]
            known = from_logprobs(self.representation.evidence, scored)
        if record is None:
            raise EngineError("the engine returned no hidden state for this sequence")
        return _summary(record, known)

    async def _submit(
        self, ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's outputs for one request; vLLM's errors as ours. Closing it aborts the request."""
        prompt = tokens_input(list(ids))
        try:
            async with aclosing(self._llm.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process ended; see its log above") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"vLLM could not answer: {error.__cause__ or error}") from error

    def _params(self, prompt_ids: Sequence[int], sampling: Sampling, capture: bool) -> SamplingParams:
        room = room_for_answer(len(prompt_ids), len(self._closing_ids), self.max_model_len)
        wanted = [sampling.logprobs, TOP if capture and self.representation.evidence else None]
        return SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logprobs=max((n for n in wanted if n is not None), default=None),
            output_kind=RequestOutputKind.DELTA,
            extra_args={KEY: {"tag": self._tag_ids, "given": False}},
        )


def _engine_args(settings: EngineSettings) -> AsyncEngineArgs:
    on_cpu = current_platform.is_cpu()
    kv_cache_bytes = settings.kv_cache_bytes
    if on_cpu and kv_cache_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        kv_cache_bytes = 1 << 30  # vLLM's own choice is a share of all memory, which is often not free
    if on_cpu and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) <= 4:  # vLLM keeps one core for itself, which on a small machine is half of it
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    worker = "vllm_cpu_worker.CaptureCPUWorker" if on_cpu else "vllm_gpu_worker.CaptureGPUWorker"
    return AsyncEngineArgs(
        model=str(settings.model),
        served_model_name=settings.served_model_name,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        kv_cache_memory_bytes=kv_cache_bytes,
        enforce_eager=settings.eager,
        async_scheduling=False,
        worker_cls=f"engine.{worker}",
        scheduler_cls="engine.vllm_scheduler.CaptureScheduler",
        trust_remote_code=False,
        seed=0,
    )


def _queued(output: RequestOutput) -> float | None:
    stats = output.metrics  # absent where vLLM keeps none
    return max(0.0, stats.scheduled_ts - stats.queued_ts) if stats and stats.scheduled_ts else None


def _summary(record: tuple[int, bool, bytes, bytes], known: torch.Tensor) -> HiddenSummary:
    positions, complete, mean, last = record
    return HiddenSummary(_from_bytes(mean), _from_bytes(last), known, positions, complete)


def _from_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def _token_logprob(token_id: int, entry: _Logprobs) -> TokenLogprob:
    best = sorted(entry.items(), key=lambda item: -item[1].logprob)
    return TokenLogprob(
        token_id,
        entry[token_id].decoded_token or "",
        entry[token_id].logprob,
        tuple((i, e.decoded_token or "", e.logprob) for i, e in best),
    )
