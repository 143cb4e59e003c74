"""Inside vLLM's worker: adds every step's states to the block sums, and reports for the requests that are due.

Tracks vLLM 0.32 (0.16 to 0.33 have the same seam): between `execute_model` and `sample_tokens`, the model
runner's `execute_model_state` holds the states that go to the LM head, already normed and outside compiled code,
and the slots where the step's keys and values lie.

One mixin serves vLLM's CPU and GPU workers. They stand in files of their own, since the CPU worker wants to
be imported before everything else of vLLM.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.block_sums import BlockSums
from engine.vllm_scheduler import KEY, full_attention_group


class CaptureMixin:
    """A worker that adds every step's states to its block sums and reports for those who are due."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    _sums: BlockSums | None = None
    _layer: str
    _records: dict[str, tuple[int, bool, bytes, bytes]]

    def execute_model(self, scheduler_output: Any) -> Any:
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._records = {}
        state = self.model_runner.execute_model_state
        if state is not None and scheduler_output.total_num_scheduled_tokens:
            self._capture(scheduler_output, state)
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        with _unfinished_prompts_draw_nothing(self.model_runner):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._records:
            setattr(output, KEY, self._records)
        return output

    def _capture(self, scheduler_output: Any, state: Any) -> None:
        if self._sums is None:
            self._sums = self._allocate()
        rows = scheduler_output.total_num_scheduled_tokens
        slots = state.slot_mappings[self._layer][:rows]
        self._sums.add(state.hidden_states[:rows], slots)
        for request_id, (blocks, n) in getattr(scheduler_output, KEY).items():
            mean, complete = self._sums.mean(blocks, n)
            row = self.model_runner.input_batch.req_id_to_index[request_id]
            last = state.sample_hidden_states[row].float()
            self._records[request_id] = (n, complete, _to_bytes(mean), _to_bytes(last))

    def _allocate(self) -> BlockSums:
        config = self.model_runner.kv_cache_config
        group = config.kv_cache_groups[full_attention_group(config)]
        self._layer = group.layer_names[0]
        hidden_size = self.vllm_config.model_config.get_hidden_size()
        return BlockSums(config.num_blocks, group.kv_cache_spec.block_size, hidden_size, self.device)


class _unfinished_prompts_draw_nothing:
    """vLLM samples for half-computed prompts too, discards that token and winds the request's random generator
    back. A CPU generator cannot be wound back, and the attempt ends the engine (seen with vLLM 0.32: any
    request with a seed whose prompt is computed in chunks). So such rows draw from the common generator instead.
    """

    def __init__(self, model_runner: Any) -> None:
        self._generators: dict[int, torch.Generator] = model_runner.input_batch.generators
        discarded = model_runner.discard_request_mask.np[: model_runner.input_batch.num_reqs]
        self._kept = {i: g for i, g in self._generators.items() if discarded[i] and g.device.type == "cpu"}

    def __enter__(self) -> None:
        for index in self._kept:
            del self._generators[index]

    def __exit__(self, *_: object) -> None:
        self._generators.update(self._kept)


def _to_bytes(vector: torch.Tensor) -> bytes:
    return vector.cpu().numpy().tobytes()
