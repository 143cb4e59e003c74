"""The serving engine: vLLM, with the hidden states taken in the pass that generates the answer.

In the server, only the vllm_*.py files import vllm. This one runs in the API process: it translates a request to
vLLM's parameters, removes the tag from the output and builds the summary.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from copy import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A forked engine waits for ever in OpenMP, whose threads this process has used by then. vLLM's CPU build spawns too.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault(
    "VLLM_MAX_IMAGE_PIXELS", str(1 << 25)
)  # 100 MB as colours; a small file may say many more

import torch
from safetensors import safe_open
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import EngineInput
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from candor.engine import start_failures
from candor.engine.answer import AnswerText
from candor.engine.base import (
    AdapterIdentity,
    Delta,
    EngineDead,
    EngineError,
    Generation,
    HiddenSummary,
    PromptReading,
    PromptStates,
    Representation,
    Sampling,
    TokenLogprob,
)
from candor.engine.evidence import features
from candor.engine.identity import as_before, identify, identify_adapter
from candor.engine.prompt import ChatFormat
from candor.engine.room import require_fit, room_for_answer
from candor.engine.settings import EngineSettings
from candor.engine.slot_evidence import of_answer
from candor.engine.vllm_capture import Record
from candor.engine.vllm_options import FRONTEND, changing_h, images
from candor.engine.vllm_scheduler import KEY, PROMPT_KEY

logger = logging.getLogger("candor")

S = TypeVar("S", HiddenSummary, PromptStates, PromptReading)

_NO_TAG = [-1]
"""A tag that no model writes."""

_Logprobs = Mapping[int, Any]
"""vLLM's mapping: token id -> Logprob (logprob, rank, decoded_token), for the token itself and the likeliest."""


class VLLMEngine:
    """See `engine.base.Engine`. Several may share one vLLM: one without an adapter, and `with_adapter` for each.

    args: what vLLM was started with. frontend: options of its request handlers. llm: vLLM's own engine.
    lora: the adapter in vLLM's terms, or None.
    """

    def __init__(self, settings: EngineSettings, chat: ChatFormat) -> None:
        self.max_model_len = settings.max_model_len
        self.identity = identify(
            settings.model, chat, settings.dtype, settings.max_model_len, changing_h(settings.vllm)
        )
        self.earlier_identity = as_before(self.identity, settings.model)
        self._chat = chat
        self._adapters = tuple(map(_adapter, settings.adapters))
        self._adding = asyncio.Lock()
        self._compiling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="candor-compiling")
        self._stand(settings.representation, None)
        _require_decoder(settings.model)
        _require_torchvision(settings.model)
        with start_failures.collecting() as failures:
            try:
                args = self.args = _engine_args(settings)
                self.frontend = {k: v for k, v in settings.vllm.items() if k in FRONTEND}
                self.llm = AsyncLLM.from_vllm_config(
                    _config(args),
                    enable_log_requests=args.enable_log_requests,
                    disable_log_stats=args.disable_log_stats,
                )
            except EngineError:
                raise
            except Exception as error:  # whatever it is, the server has one message for it
                why = start_failures.first_cause(failures) or start_failures.sentence(error)
                raise EngineError(f"vLLM did not start: {why} (its log above says where)") from error

    def with_adapter(self, adapter: Path, representation: Representation) -> VLLMEngine:
        """Returns an engine on the same vLLM that uses one of its adapters. Closing either closes both.

        Raises EngineError if vLLM was not started with this adapter.
        """
        other = copy(self)
        for number, (path, identity) in enumerate(self._adapters, 1):
            if path == adapter:
                other._stand(representation, identity, LoRARequest(identity.sha256, number, str(path)))
                return other
        raise EngineError(f"vLLM was started without the adapter {adapter}")

    def _stand(
        self,
        representation: Representation,
        adapter: AdapterIdentity | None,
        request: LoRARequest | None = None,
    ) -> None:
        self.representation = representation
        self.adapter = adapter
        self.lora = request
        self._closing_ids, self._tag_ids = self._chat.closing(representation.tag)

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        return self.write(
            tokens_input(list(prompt_ids)),
            self.params(sampling),
            capture=capture,
            prompt_states=prompt_states,
            tagged=sampling.grammar is None,
        )

    async def write(
        self,
        prompt: EngineInput,
        params: SamplingParams,
        *,
        capture: bool,
        prompt_states: bool,
        tagged: bool = True,
        seen: Callable[[RequestOutput], None] | None = None,
        **how: Any,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        """As `generate`, for a request in vLLM's own form. params: `extra_args` are set here; output_kind is DELTA.

        tagged: whether the tag ends the answer wherever it comes; else only at the beginning of a line, for a grammar
        may allow it inside of a text.
        seen: gets each of vLLM's outputs before what is shown of it. how: further arguments of `AsyncLLM.generate`.
        """
        prompt_ids = prompt["prompt_token_ids"]
        room = room_for_answer(len(prompt_ids), len(self._closing_ids), self.max_model_len)
        params.max_tokens = min(params.max_tokens or room, room)
        tag_ids = self._tag_ids if tagged else _NO_TAG
        reported = params.logprobs is not None
        # What closing replaces would take its log-probability with it.
        closed = capture and params.num_logprobs is None
        params.extra_args = self._wish(
            tag_ids, evidence=capture, prompt=prompt_states, closing=self._closing_ids if closed else ()
        )
        answer = AnswerText(self.representation.tag, tag_ids, reported, tag_alone=not tagged)
        states = None
        async with aclosing(self._submit(prompt, params, **how)) as outputs:
            async for output in outputs:
                if seen is not None:
                    seen(output)
                if prompt_states and not answer.token_ids:  # the first
                    states = await self._prompt(prompt, output)
                    if states is not None:
                        yield states
                completion = output.outputs[0]
                logprobs = [
                    _token_logprob(token_id, entry)
                    for token_id, entry in zip(completion.token_ids, completion.logprobs or (), strict=False)
                ]
                if delta := answer.add(completion.text, completion.token_ids, logprobs):
                    yield delta
        if completion.finish_reason == "error":
            wrong = ValueError("the grammar could not be compiled") if params.structured_outputs else None
            raise EngineError("vLLM gave this request up; its log above says why") from wrong
        cut = completion.finish_reason == "length"
        length = answer.length(self._chat.is_blank, cut=cut)
        if delta := answer.finish(length, stopped=isinstance(completion.stop_reason, str), cut=cut):
            yield delta

        record = _record(output)
        hidden = None
        if capture:
            try:
                hidden = await self._hidden(prompt, answer, length, record)
            except EngineDead:
                raise
            except EngineError as error:  # the answer is still returned; it cannot be scored
                logger.warning("no hidden state for an answer: %s", error)
        # stop_reason: None for the first end token, the id of any other, or a stop string.
        ended = answer.tag_found or (
            completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
        )
        beyond = answer.token_ids[:-1][-len(tag_ids) :] == tag_ids  # the token after the tag
        yield Generation(
            text=answer.text,
            token_ids=tuple(self._response_ids(answer, length)),
            finish_reason="stop" if answer.tag_found or completion.finish_reason == "stop" else "length",
            tagged=answer.tag_found,
            truncated=not ended,
            hidden=hidden,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(answer.token_ids) - beyond,
            logprobs=answer.reported_logprobs,
            queued_s=_queued(output),
            prompt=states,
        )

    async def given(
        self,
        prompt_ids: Sequence[int],
        completion: CompletionOutput,
        *,
        capture: bool,
        states: PromptStates | None,
    ) -> Generation:
        """Returns a completion that vLLM wrote without capture, such as a beam, as an answer of this engine."""
        answer = AnswerText(self.representation.tag, self._tag_ids)
        answer.add(completion.text, completion.token_ids)
        cut = completion.finish_reason == "length"
        length = answer.length(self._chat.is_blank, cut=cut)
        answer.finish(length, stopped=False, cut=cut)
        response_ids = self._response_ids(answer, length)
        return Generation(
            text=answer.text,
            token_ids=tuple(response_ids),
            finish_reason="stop" if answer.tag_found or completion.finish_reason == "stop" else "length",
            tagged=answer.tag_found,
            truncated=not answer.tag_found and completion.finish_reason != "stop",
            hidden=await self.summarise(prompt_ids, response_ids) if capture else None,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(completion.token_ids),
            prompt=states,
        )

    def _response_ids(self, answer: AnswerText, length: int | None) -> list[int]:
        """Returns the answer's first `length` tokens; those of its text anew where no token ends where it does."""
        return answer.token_ids[:length] if length is not None else self._chat.encode_response(answer.text)

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        """Sends one request over prompt, response and tag; the cached prefix is not computed again."""
        return await self._summarise(tokens_input(list(prompt_ids)), response_ids, self._closing_ids)

    async def _summarise(
        self, prompt: EngineInput, response_ids: Sequence[int], closing_ids: Sequence[int]
    ) -> HiddenSummary:
        prompt_ids = prompt["prompt_token_ids"]
        ids = [*prompt_ids, *response_ids, *closing_ids]
        require_fit(len(ids), self.max_model_len)
        wish = self._wish(self._tag_ids, first=len(prompt_ids))
        whole: Any = {**prompt, "prompt_token_ids": ids}  # with the prompt's images
        return await self._given(whole, wish, lambda output: self._summary(_record(output), response_ids))

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        """Sends one request over the prompt; if the prompt was seen before, only its last block is computed."""
        return await self._prompt_states(tokens_input(list(prompt_ids)))

    async def _prompt_states(self, prompt: EngineInput) -> PromptStates:
        require_fit(len(prompt["prompt_token_ids"]), self.max_model_len)
        wish = self._wish(self._tag_ids, evidence=False, prompt=True)
        return await self._given(prompt, wish, _prompt_states)

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        """Sends one request over the prompt. The worker reports the log-probabilities with the states: vLLM's own
        way to ask for some tokens' (`logprob_token_ids`) drops those of other requests in the step."""
        require_fit(len(prompt_ids), self.max_model_len)
        wish = self._wish(self._tag_ids, evidence=False, prompt=True)
        wish[KEY]["options"] = list(token_ids)
        return await self._given(tokens_input(list(prompt_ids)), wish, _prompt_reading)

    async def _given(
        self, prompt: EngineInput, wish: dict[str, Any], read: Callable[[RequestOutput], S | None]
    ) -> S:
        """Returns what a request over `prompt` reports; the request also draws one token, which is not used."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=wish,
        )
        states = None
        for skip_cache in (False, True):  # the cache may lack a state or a token's evidence
            params.skip_reading_prefix_cache = skip_cache
            output = [output async for output in self._submit(prompt, params)][-1]
            states = read(output)
            if states is not None and states.complete:
                return states
        if states is None:
            raise EngineError("the engine returned no hidden state for this sequence")
        return states

    async def check(self) -> None:
        try:
            await self.llm.check_health()
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process ended; see its log above") from error

    async def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self.llm.shutdown()

    async def _hidden(
        self, prompt: EngineInput, answer: AnswerText, length: int | None, record: Record | None
    ) -> HiddenSummary:
        """Returns h's parts for a finished answer: as reported at its tag, else by appending the tag to it.

        The second way costs one more request, whose sequence is in the prefix cache except for its last block.
        """
        if length is None:  # the tag came in other tokens than its own: encode the text anew
            response_ids = self._chat.encode_response(answer.text)
            return await self._summarise(prompt, response_ids, self._closing_ids)
        response_ids, closing = answer.token_ids[:length], answer.closing(length) or self._closing_ids
        hidden = self._summary(record, response_ids)
        # Blanks before an end token were fed before closing; they are no part of the answer.
        whole = len(prompt["prompt_token_ids"]) + len(response_ids) + len(closing)
        if hidden is not None and hidden.complete and hidden.positions == whole:
            return hidden
        return await self._summarise(prompt, response_ids, closing)

    async def _prompt(self, prompt: EngineInput, output: RequestOutput) -> PromptStates | None:
        """Returns the states reported with the answer's first token, else requests them alone."""
        states = _prompt_states(output)
        if states is not None and states.complete:
            return states
        try:
            return await self._prompt_states(prompt)
        except EngineDead:
            raise
        except EngineError as error:  # an answer is still possible
            logger.warning("no hidden state for a prompt: %s", error)
            return None

    def _summary(self, record: Record | None, response_ids: Sequence[int]) -> HiddenSummary | None:
        """Returns the summary, or None without a record or without these tokens' evidence."""
        if record is None:
            return None
        positions, complete, mean, last, kept = record
        known = torch.zeros(0)
        if names := self.representation.evidence:
            measured = of_answer(_from_bytes(kept).view(-1, 3), response_ids)
            if measured is None:
                return None
            known = features(names, *measured)
        return HiddenSummary(_from_bytes(mean), _from_bytes(last), known, positions, complete)

    async def _submit(
        self, prompt: EngineInput, params: SamplingParams, **how: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields vLLM's outputs for one request; translates vLLM's errors. Closing it aborts the request."""
        try:
            await self._compile(params)
            async with self._adding:  # vLLM adds a request in one go: one in each turn of the event loop
                await asyncio.sleep(0)
            generated = self.llm.generate(prompt, params, uuid.uuid4().hex, lora_request=self.lora, **how)
            async with aclosing(generated) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process ended; see its log above") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"vLLM could not answer: {error.__cause__ or error}") from error

    async def _compile(self, params: SamplingParams) -> None:
        """Has vLLM compile the request's grammar in a thread; it would do so on the event loop."""
        if params.structured_outputs is None or params._validate_structured_outputs is _is_valid:
            return
        config = self.llm.vllm_config
        work = partial(
            params._validate_structured_outputs,
            config.model_config,
            config.structured_outputs_config,
            self.llm.renderer.tokenizer,
        )
        await asyncio.get_running_loop().run_in_executor(self._compiling, work)
        params._validate_structured_outputs = _is_valid

    def params(self, sampling: Sampling) -> SamplingParams:
        """Returns the sampling in vLLM's form."""
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logprobs=sampling.logprobs,
            structured_outputs=StructuredOutputsParams(**json.loads(sampling.grammar))
            if sampling.grammar
            else None,
            output_kind=RequestOutputKind.DELTA,
        )

    def _wish(
        self,
        tag_ids: list[int],
        first: int | None = None,
        evidence: bool = True,
        prompt: bool = False,
        closing: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Builds the `extra_args` that engine/vllm_scheduler.py reads."""
        evidence = evidence and bool(self.representation.evidence)
        wish = {"tag": tag_ids, "first": first, "evidence": evidence, "prompt": prompt, "closing": closing}
        return {KEY: wish}


def _is_valid(*_: Any) -> None:
    """In place of a check that was made."""


def _config(args: AsyncEngineArgs) -> Any:
    """Returns vLLM's configuration. Raises EngineError, before a process starts, for what cannot be served."""
    config = args.create_engine_config()
    text = config.model_config.hf_text_config
    if text.model_type == "deepseek_v3":
        # How DeepSeek V3 chooses experts: transformers takes it for granted and does not write it into config.json,
        # vLLM takes DeepSeek V2's way where it is not said.
        vars(text).update({"scoring_func": "sigmoid", "topk_method": "noaux_tc"} | vars(text))
    if config.model_config.runner_type != "generate":
        raise EngineError(
            f"{config.model_config.architecture} writes no text, it has no LM head; serve a model that has one"
        )
    if images(vars(args)) and not config.model_config.is_multimodal_model:
        raise EngineError(
            f"{config.model_config.architecture} does not look at images; leave out --limit-mm-per-prompt"
        )
    if config.model_config.is_attention_free:
        raise EngineError(
            f"{config.model_config.architecture} has no attention layer: no KV block holds the whole sequence, so "
            "its mean hidden state cannot be taken; serve a model with attention layers"
        )
    if config.speculative_config is not None and config.use_v2_model_runner:
        raise EngineError(
            "speculation is served by vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0, or leave it out"
        )
    # vLLM decides whether it can plan a step ahead: its CPU build does not, nor does n-gram speculation.
    scheduler = "CaptureAsyncScheduler" if config.scheduler_config.async_scheduling else "CaptureScheduler"
    config.scheduler_config.scheduler_cls = f"candor.engine.vllm_scheduler.{scheduler}"
    return config


def _engine_args(settings: EngineSettings) -> AsyncEngineArgs:
    on_cpu = current_platform.is_cpu()
    kv_cache_bytes = settings.kv_cache_bytes
    if on_cpu and kv_cache_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        kv_cache_bytes = 1 << 30  # vLLM's default is a share of all memory, which is often not free
    if on_cpu and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) <= 4:  # vLLM reserves one core, which is half of a small machine
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _shared_out(cores, settings.vllm)
    block_size = settings.block_size or (32 if on_cpu else None)  # vLLM's default on CPUs is 128
    worker = "vllm_cpu_worker.CaptureCPUWorker" if on_cpu else "vllm_gpu_worker.CaptureGPUWorker"
    ours: dict[str, Any] = dict(
        model=str(settings.model),
        served_model_name=settings.served_model_name,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=block_size,
        kv_cache_memory_bytes=kv_cache_bytes,
        enforce_eager=settings.eager,
        async_scheduling=None if settings.asynchronous else False,  # None: where vLLM can
        worker_cls=f"candor.engine.{worker}",
        enable_lora=bool(settings.adapters),
        # On a CPU, vLLM 0.32 applies its last adapter slot to requests without one (index -1), so it stays empty.
        max_loras=max(1, len(settings.adapters) + on_cpu),
        max_lora_rank=_fitting_rank(settings.adapters),
        language_model_only=not images(settings.vllm),  # for multimodal models
        trust_remote_code=False,
        seed=0,
    )
    given = {k: v for k, v in settings.vllm.items() if k not in FRONTEND}
    if images(settings.vllm):
        given["limit_mm_per_prompt"] = {**given["limit_mm_per_prompt"], "video": 0, "audio": 0}
    return AsyncEngineArgs(**ours | given)


def _shared_out(cores: Sequence[int], options: Mapping[str, Any]) -> str:
    """Cores in vLLM's form: every rank's list, in the order of ranks."""
    ranks = 1
    for name in ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"):
        ranks *= options.get(name, 1)
    each = max(1, len(cores) // ranks)
    lists = (cores[rank * each % len(cores) :][:each] for rank in range(ranks))
    return "|".join(",".join(map(str, some)) for some in lists)


def _require_torchvision(model: Path) -> None:
    """Raises EngineError if vLLM needs torchvision to read the model, although only text is served."""
    config = _config_of(model)
    of_images = "vision_config" in config or str(config.get("model_type")).startswith(
        "qwen3_5"
    )  # its text model too
    if of_images and find_spec("torchvision") is None:
        raise EngineError(
            f"vLLM's code for {model.name} reads images too and needs torchvision, which is not installed: install "
            "the one made for this torch, or serve another model, of text alone"
        )


def _require_decoder(model: Path) -> None:
    """Raises EngineError for a model with an encoder."""
    if _config_of(model).get("is_encoder_decoder"):
        raise EngineError(
            f"{model.name} reads with an encoder and writes with a decoder: its prompt and its answer are no one "
            "sequence, of which h could be the mean; serve a model that is a decoder alone"
        )


def _config_of(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config


def _adapter(path: Path) -> tuple[Path, AdapterIdentity]:
    """Raises EngineError if there is no adapter, or if it adapts more than the layers."""
    identity = identify_adapter(path)
    with safe_open(path / "adapter_model.safetensors", "pt") as weights:
        beyond = [name for name in weights.keys() if "lm_head" in name or "embed_tokens" in name]  # noqa: SIM118
    if beyond:
        raise EngineError(f"{path} adapts {beyond[0]}; only adapters of the layers can be served")
    return path, identity


def _adapter_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _fitting_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank supported by vLLM that fits all adapters."""
    rank = max((_adapter_config(path)["r"] for path in adapters), default=1)
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _queued(output: RequestOutput) -> float | None:
    stats = output.metrics  # None if vLLM keeps none
    return max(0.0, stats.scheduled_ts - stats.queued_ts) if stats and stats.scheduled_ts else None


def _record(output: RequestOutput) -> Record | None:
    return (output.kv_transfer_params or {}).get(KEY)


def _prompt_states(output: RequestOutput) -> PromptStates | None:
    record = (output.kv_transfer_params or {}).get(PROMPT_KEY)
    if record is None:
        return None
    _, complete, mean, last, _ = record
    return PromptStates(_from_bytes(mean), _from_bytes(last), complete)


def _prompt_reading(output: RequestOutput) -> PromptReading | None:
    states = _prompt_states(output)
    if states is None:
        return None
    *_, logprobs = output.kv_transfer_params[PROMPT_KEY]
    return PromptReading(states, tuple(_from_bytes(logprobs).tolist()))


def _keep_records_of_merged_outputs() -> None:
    """vLLM merges outputs that have not been read yet and keeps only the latest `kv_transfer_params`: under load, the
    second token's output would drop the prompt's record."""
    join = RequestOutput.add

    def joined(self: Any, following: Any, aggregate: bool) -> None:
        records = self.kv_transfer_params
        join(self, following, aggregate)
        if records:
            self.kv_transfer_params = records | (following.kv_transfer_params or {})

    RequestOutput.add = joined


_keep_records_of_merged_outputs()


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
