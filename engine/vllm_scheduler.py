"""Inside vLLM's scheduler: which requests report in a step, and the way back of what they report.

Tracks vLLM 0.32 (0.16 to 0.33 have the same seams). What it leans on, and what to look at when vLLM changes:
- `Scheduler.schedule` returns a SchedulerOutput that is pickled to the worker with its attributes; after it,
  `request.num_computed_tokens` counts what the step will have computed.
- `ModelRunnerOutput` returns to `Scheduler.update_from_output` with its attributes; `EngineCoreOutput.
  kv_transfer_params` passes through to `RequestOutput` in the API process unread.

A request takes part by `SamplingParams.extra_args = {"candor": {"tag": [ids], "given": bool}}`. It reports in the
step in which the tag's last token is fed: that row is the state at the declared position. The scheduler
knows that step beforehand, since with synchronous scheduling the token was sampled a step earlier. A generated
tag also ends the request in that step; the token sampled after it is dropped by the engine.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus

KEY = "candor"


def full_attention_group(config: KVCacheConfig) -> int:
    """The KV cache group whose blocks hold every token of a sequence."""
    for index, group in enumerate(config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    raise ValueError(
        "this model has no full-attention layer: no group of KV blocks holds the whole sequence, "
        "so its mean hidden state cannot be taken"
    )


class CaptureScheduler(Scheduler):
    """Says in each step which requests report, and ends a request one step after its tag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling or self.vllm_config.speculative_config is not None:
            raise ValueError(
                "hidden states are captured under synchronous scheduling without speculative decoding: "
                "a step must know the tokens it is fed; start vLLM with async_scheduling=False"
            )
        self._group = full_attention_group(self.kv_cache_config)
        self._block_size = self.kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        self._ending: set[str] = set()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        reports: dict[str, tuple[list[int], int]] = {}
        for request_id in output.num_scheduled_tokens:
            request = self.requests[request_id]
            wish = _wish(request)
            if wish and _tag_is_fed(request, wish):
                n = request.num_computed_tokens
                blocks = self.kv_cache_manager.get_block_ids(request_id)[self._group]
                reports[request_id] = (list(blocks[: -(-n // self._block_size)]), n)
                if not wish["given"]:
                    self._ending.add(request_id)
        setattr(output, KEY, reports)
        return output

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        if request.request_id in self._ending:
            self._ending.discard(request.request_id)
            if not stopped:
                request.status = RequestStatus.FINISHED_STOPPED
                stopped = True
        return tokens, stopped

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        records = getattr(model_runner_output, KEY, None)
        if records:
            for client in outputs.values():
                for output in client.outputs:
                    if output.request_id in records:
                        output.kv_transfer_params = {KEY: records[output.request_id]}
        self._ending.intersection_update(self.requests)  # an aborted request never ends otherwise
        return outputs


def _wish(request: Request) -> Any:
    params = request.sampling_params
    return params.extra_args.get(KEY) if params is not None and params.extra_args else None


def _tag_is_fed(request: Request, wish: dict[str, Any]) -> bool:
    """Whether this step feeds the tag's last token as the sequence's last."""
    if request.num_computed_tokens != request.num_tokens:
        return False  # a chunk of the prompt, or a sequence that is being recomputed
    if wish["given"]:
        return bool(request.num_output_tokens == 0)
    tag = wish["tag"]
    return bool(request.num_output_tokens >= len(tag) and list(request.output_token_ids[-len(tag) :]) == tag)
