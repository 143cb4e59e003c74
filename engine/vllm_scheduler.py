"""Runs inside vLLM's scheduler: decides which requests report in a step, and returns their reports.

It tracks vLLM 0.32 (0.16 to 0.33 have the same seams). It depends on the following; check it when vLLM changes:
- `Scheduler.schedule` returns a SchedulerOutput that is pickled to the worker with its attributes; after it,
  `request.num_computed_tokens` counts what the step will have computed.
- `BlockPool.get_new_blocks` gives out every block that does not come from the prefix cache.
- `ModelRunnerOutput` returns to `Scheduler.update_from_output` with its attributes; `EngineCoreOutput.
  kv_transfer_params` passes through to `RequestOutput` in the API process unread.

A request takes part by `SamplingParams.extra_args = {"candor": {"tag": [ids], "first": int | None, "evidence":
bool, "prompt": bool, "options": [ids], "closing": [ids]}}`. first: start of a given response; None for a generated
one. A request reports in the step that feeds the tag's last token: that row is the state at the declared position. A
generated tag also ends the request in that step; the engine drops the token sampled after it.

closing: separator and tag. An answer that ends without a tag of its own does not end yet where the scheduler is the
synchronous one: its end token is held back, closing takes its place, and the next step feeds it, so that the request
reports as with a tag of its own. Otherwise (no closing) the API process sends a second request, which computes the
sequence's last block again; for answers of a word that is as much work as the answer.

prompt: a request to generate also reports in the step that feeds the prompt's last token, as a sequence without a
response. Its blocks then hold only the prompt: full blocks that may be shared, and a last one of its own, in which
the answer begins a step later. The record is sent with the answer's first token. Such a step always exists: if the
whole prompt is in the prefix cache, vLLM computes the last block again.

options: tokens whose log-probabilities after the prompt are reported with it; may be left out.

The synchronous scheduler knows which step feeds the tag's last token: the token was sampled a step earlier. The
asynchronous one plans a step before it has seen the token that the step feeds. So a request reports if its tokens so
far are the tag's except the last, and the report counts if the last one came (a one-token tag reports in every step).

With speculative decoding a step feeds tokens of which nobody knows yet whether they stay. So a generated answer does
not report: it ends at its tag, and the API process sends a second request, over the answer and its tag, which finds
all but the last block in the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request, RequestStatus

from candor.engine.orphan import end_with_parent
from candor.engine.start_failures import report_here

KEY = "candor"
_ENDING = "candor_ending"  # attribute of a request that holds its `_Ending`
PROMPT_KEY = "candor_prompt"  # key of a prompt's record; an answer's record may come with it


@dataclass
class StepPlan:
    """What the worker must do in a step, by request.

    fresh: blocks given out since the last step; their old sums and evidence belong to other tokens.
    reports: (blocks that hold the sequence, its positions, start of the response, or the end for a prompt).
    scored: (row within the request, tokens): the known tokens that follow that row and the next ones.
    options: tokens whose log-probabilities at the request's sampled row are part of its report.
    closed: (answer tokens that stay, closing): the tokens that follow them in place of what was sampled.
    evidence: whether to measure the sampled tokens' evidence.
    """

    reports: dict[str, tuple[list[int], int, int]] = field(default_factory=dict)
    scored: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    options: dict[str, list[int]] = field(default_factory=dict)
    closed: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    evidence: bool = False
    fresh: list[int] = field(default_factory=list)


def keep_whole_sequences(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Returns the layers' specs, changed so that at least one layer keeps a sequence's blocks to its end.

    If every attention layer has a sliding window (Mistral 7B v0.1, Phi-3), vLLM frees the blocks that the window
    has passed, and their sums are lost. As windowed full attention the blocks are kept: the computation is the same,
    and the cache takes as much memory as without a window.
    """
    if any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
        return specs
    names = [field.name for field in fields(FullAttentionSpec)]
    return {
        name: FullAttentionSpec(**{one: getattr(spec, one) for one in names if hasattr(spec, one)})
        if type(spec) is SlidingWindowSpec
        else spec
        for name, spec in specs.items()
    }


def full_attention_group(config: KVCacheConfig) -> int:
    """Index of the KV cache group whose blocks hold every token of a sequence.

    Raises ValueError if there is none.
    """
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        # Layers of several sizes share one block table; the scheduler sees only the first of them.
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = next(iter(spec.kv_cache_specs.values()))
        if isinstance(spec, FullAttentionSpec):
            return index
    raise ValueError(
        "this model has no full-attention layer: no group of KV blocks holds the whole sequence, "
        "so its mean hidden state cannot be taken"
    )


@dataclass
class _Ending:
    """How an answer ended to which its closing was appended.

    kept: its tokens before closing. status, reason: as vLLM would have ended it. held: tokens not sent on yet.
    told: whether the worker knows.
    """

    kept: int
    status: RequestStatus
    reason: int | None
    held: list[int]
    told: bool = False


class SchedulerCapture:
    """Adds a `StepPlan` to each step, and ends a request one step after its tag."""

    requests: dict[str, Request]
    kv_cache_config: KVCacheConfig
    kv_cache_manager: Any
    vllm_config: Any
    _can_close = False
    """Whether no step is planned before the one before is seen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        report_here()
        end_with_parent()
        super().__init__(*args, **kwargs)
        self._speculates = self.vllm_config.speculative_config is not None
        self._closes = self._can_close and not (
            self._speculates
            or self.vllm_config.use_v2_model_runner
            or self.vllm_config.parallel_config.pipeline_parallel_size > 1
        )
        self._group = full_attention_group(self.kv_cache_config)
        self._block_size = self.kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        self._reported: dict[str, tuple[list[int], int, int]] = {}  # in the step whose outputs are processed
        self._fresh: list[int] = []
        self._watch_new_blocks(self.kv_cache_manager.block_pool)

    def _watch_new_blocks(self, pool: Any) -> None:
        """Notes every newly given block, whether this step, a connector or a copy fills it.

        Blocks from the prefix cache are not included: their sums and evidence remain valid.
        """
        get_new_blocks = pool.get_new_blocks

        def noted(*args: Any, **kwargs: Any) -> Any:
            blocks = get_new_blocks(*args, **kwargs)
            self._fresh += [block.block_id for block in blocks]
            return blocks

        pool.get_new_blocks = noted

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        wanted, self._fresh = StepPlan(fresh=self._fresh), []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            if wish := _wish(request):
                self._plan(request, wish, scheduled, wanted)
        setattr(output, KEY, wanted)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        due = getattr(scheduler_output, KEY).reports
        prompts = {request_id for request_id, (_, positions, first) in due.items() if positions == first}
        self._reported = {request_id: due[request_id] for request_id in due if request_id not in prompts}
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if records := getattr(model_runner_output, KEY, None):
            for client in outputs.values():
                for output in client.outputs:
                    if output.request_id in prompts:
                        output.kv_transfer_params = {PROMPT_KEY: records[output.request_id]}
                    elif output.finish_reason is not None and output.request_id in self._reported:
                        output.kv_transfer_params = {KEY: records[output.request_id]}
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if self._closes and (ended := self._closed(request, new_token_ids)) is not None:
            return ended
        # One token after the tag, as without speculation: vLLM shows no text of a stopped answer's last one.
        end = _end_after_tag(request, new_token_ids) if self._speculates else None
        tokens, stopped = super()._update_request_with_output(request, new_token_ids[:end], *args, **kwargs)  # type: ignore[misc]
        if end is not None and not stopped:
            request.status = RequestStatus.FINISHED_STOPPED
            stopped = True
        if request.request_id in self._reported:
            if not _has_tag(request, self._reported[request.request_id][1]):
                self._reported.pop(request.request_id)
            elif not stopped:
                request.status = RequestStatus.FINISHED_STOPPED
                stopped = True
        elif self._closes and stopped and request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            stopped = not self._close(request, request.status, None, [])
        return tokens, stopped

    def _closed(self, request: Request, sampled: list[int]) -> tuple[list[int], bool] | None:
        """Returns what is sent on, and whether the request ends, where an end token came, or closing was fed."""
        ending: _Ending | None = getattr(request, _ENDING, None)
        if ending is not None:  # what was sampled after the tag is dropped
            request.status, request.stop_reason = ending.status, ending.reason
            return ending.held, True
        if request.request_id in self._reported and _has_tag(request, self._reported[request.request_id][1]):
            return None
        params, (token, *_) = request.sampling_params, sampled
        first = params.eos_token_id
        if token != first and token not in (params.stop_token_ids or ()):
            return None
        reason = None if token == first else token
        return ([], False) if self._close(request, RequestStatus.FINISHED_STOPPED, reason, [token]) else None

    def _close(self, request: Request, status: RequestStatus, reason: int | None, held: list[int]) -> bool:
        """Appends closing to a request that would have ended; returns whether it does not end yet."""
        wish = _wish(request)
        # An answer of no token has sent nothing on yet, not even its prompt's record.
        if not wish or not wish.get("closing") or not request.num_output_tokens:
            return False
        setattr(request, _ENDING, _Ending(request.num_output_tokens, status, reason, held))
        request.append_output_token_ids(list(wish["closing"]))
        request.status = RequestStatus.RUNNING
        return True

    def _plan(self, request: Request, wish: dict[str, Any], scheduled: int, wanted: StepPlan) -> None:
        end = request.num_computed_tokens  # once the step is done
        ending: _Ending | None = getattr(request, _ENDING, None)
        if ending is not None and not ending.told:
            wanted.closed[request.request_id] = (ending.kept, list(wish["closing"]))
            ending.told = True
        first = request.num_prompt_tokens if wish["first"] is None else wish["first"]
        if wish["evidence"]:
            wanted.evidence = True
        if wish["evidence"] and ending is None:  # closing's tokens need none
            begin = end - scheduled
            low, high = max(begin, first - 1), min(end, request.num_tokens - 1)
            if low < high:  # a given response, or one that is computed again after preemption
                following = list(request.all_token_ids[low + 1 : high + 1])
                wanted.scored[request.request_id] = (low - begin, following)
        # After preemption the prompt is fed again, but its report was already sent with the first token.
        is_prompt = wish["prompt"] and end == request.num_prompt_tokens and not request.num_output_tokens
        if ending is not None:
            may_end = end == request.num_prompt_tokens + request.num_output_tokens
        else:
            may_end = not (self._speculates and wish["first"] is None) and _may_feed_tag(request, wish, end)
        if is_prompt or may_end:
            blocks = self.kv_cache_manager.get_block_ids(request.request_id)[self._group]
            kept = list(blocks[: -(-end // self._block_size)])
            wanted.reports[request.request_id] = (kept, end, end if is_prompt else first)
        if is_prompt and (options := wish.get("options")):
            wanted.options[request.request_id] = options


class CaptureScheduler(SchedulerCapture, Scheduler):
    _can_close = True


class CaptureAsyncScheduler(SchedulerCapture, AsyncScheduler):
    pass


def _wish(request: Request) -> Any:
    params = request.sampling_params
    return params.extra_args.get(KEY) if params is not None and params.extra_args else None


def _may_feed_tag(request: Request, wish: dict[str, Any], end: int) -> bool:
    """Whether a step that ends before position `end` feeds the tag's last token last, as far as the tokens are
    known."""
    if wish["first"] is not None:
        return bool(end == request.num_prompt_tokens)
    tag = wish["tag"]
    stop = end - request.num_prompt_tokens  # output tokens that will have been fed
    start = stop - len(tag)
    if start < 0 or stop < request.num_output_tokens:  # too few, or a sequence that is being recomputed
        return False
    seen = list(request.output_token_ids[start:stop])  # without tokens not sampled yet
    return bool(seen == tag[: len(seen)])


def _end_after_tag(request: Request, new_token_ids: list[int]) -> int | None:
    """Number of the new tokens up to the one after a generated answer's first tag; None if none comes after one."""
    wish = _wish(request)
    if not wish or wish["first"] is not None:
        return None
    tag, before = wish["tag"], request.num_output_tokens
    tokens = [*request.output_token_ids, *new_token_ids]
    tagged = (end for end in range(before, len(tokens)) if tokens[max(0, end - len(tag)) : end] == tag)
    end = next(tagged, None)
    return None if end is None else end + 1 - before


def _has_tag(request: Request, end: int) -> bool:
    """Whether the tokens before position `end` end with the tag; always True for a given response."""
    wish = _wish(request)
    if wish["first"] is not None:
        return True
    stop = end - request.num_prompt_tokens
    return bool(list(request.output_token_ids[stop - len(wish["tag"]) : stop]) == wish["tag"])
