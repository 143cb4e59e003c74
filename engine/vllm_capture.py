"""Inside vLLM's worker: keeps what every step shows of states and tokens, and reports for the requests that are due.

Tracks vLLM 0.32 (0.16 to 0.33 have the same seams), with both of its model runners, synchronous or not:
- between `execute_model` and `sample_tokens`, the runner's `execute_model_state` holds the states that go to the LM
  head, already normed and outside compiled code, and the slots where the step's keys and values lie;
- the runner's `sampler` is given the model's logits and gives back what it draws, `sampled_token_ids`;
- what `sample_tokens` returns is a ModelRunnerOutput, or has one come later through `get_output`.

Kept is what belongs to the KV cache: sums of states per block (engine/block_sums.py), evidence per slot
(engine/slot_evidence.py). Only index arithmetic on the device, and nothing waits for it: what is reported is copied
to the host behind the step's own work, and looked at when vLLM looks at the step's tokens.

One mixin serves vLLM's CPU and GPU workers. They stand in files of their own, since the CPU worker wants to
be imported before everything else of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.block_sums import BlockSums
from engine.slot_evidence import SlotEvidence
from engine.vllm_scheduler import KEY, Wanted, full_attention_group

Record = tuple[int, bool, bytes, bytes, bytes]
"""(positions, whether all were counted, mean (H,), last state (H,), evidence (T, 3)), float32 as bytes."""


@dataclass(frozen=True)
class _Step:
    """rows of `hidden` (R, H) and `slots` (R,) are the step's tokens, request after request.

    starts: where each request's rows begin. last: (n,) the row of each request from which it samples.
    """

    wanted: Wanted
    hidden: torch.Tensor
    slots: torch.Tensor
    row_of: dict[str, int]
    starts: Sequence[int]
    last: torch.Tensor


class CaptureMixin:
    """A worker that keeps what every step shows and reports for those who are due."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    _sums: BlockSums | None = None
    _evidence: SlotEvidence
    _layer: str
    _step: _Step | None = None

    def execute_model(self, scheduler_output: Any) -> Any:
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        state = self.model_runner.execute_model_state
        if state is not None and scheduler_output.total_num_scheduled_tokens:
            self._step = self._look(scheduler_output, state)
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        with _unfinished_prompts_draw_nothing(self.model_runner):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        step, self._step = self._step, None
        if step is not None:
            for request_id, (offset, tokens) in step.wanted.scored.items():
                self._score(step, request_id, offset, tokens)
            if step.wanted.reports:
                _deliver(output, self._report(step))
        return output

    def _look(self, scheduler_output: Any, state: Any) -> _Step:
        if self._sums is None:
            self._sums = self._allocate()
        rows = scheduler_output.total_num_scheduled_tokens
        batch = getattr(state, "input_batch", None)
        if batch is None:  # vLLM's first model runner
            batch, starts = self.model_runner.input_batch, self.model_runner.query_start_loc
            mappings = state.slot_mappings
            starts_on_host, last = starts.np, starts.gpu[1 : batch.num_reqs + 1] - 1
        else:
            mappings, starts_on_host = state.slot_mappings_by_layer, batch.query_start_loc_np
            last = batch.logits_indices
        hidden, slots = state.hidden_states[:rows], mappings[self._layer][:rows]
        self._sums.add(hidden, slots)
        self._evidence.clear(slots)
        row_of = {request_id: row for row, request_id in enumerate(batch.req_ids)}
        wanted = getattr(scheduler_output, KEY, None) or Wanted()
        return _Step(wanted, hidden, slots, row_of, starts_on_host, last)

    def _heard(self, logits: torch.Tensor, sampled: torch.Tensor) -> None:
        """logits: (n, V) as the model gave them. sampled: (n, 1), what was drawn."""
        if self._step is not None and self._step.wanted.evidence:
            self._evidence.write(self._step.slots[self._step.last], sampled[:, 0], logits)

    def _score(self, step: _Step, request_id: str, offset: int, tokens: list[int]) -> None:
        """Evidence of tokens that are fed instead of sampled."""
        start = int(step.starts[step.row_of[request_id]]) + offset
        rows = slice(start, start + len(tokens))
        logits = _logits(self.model_runner.model, step.hidden[rows])
        self._evidence.write(step.slots[rows], _to_device(tokens, self.device), logits)

    def _report(self, step: _Step) -> Callable[[], dict[str, Record]]:
        """What is due, on its way to the host; the result waits for it."""
        assert self._sums is not None
        found: dict[str, tuple[int, list[torch.Tensor]]] = {}
        for request_id, (blocks, positions, first) in step.wanted.reports.items():
            index = _to_device(blocks, self.device)
            mean, counted = self._sums.mean(index, positions)
            last = step.hidden.index_select(0, step.last[step.row_of[request_id]].unsqueeze(0))
            evidence = self._evidence.read(index, first, positions)
            parts = [counted, mean, last.float(), evidence]
            found[request_id] = positions, [part.to("cpu", non_blocking=True) for part in parts]
        copied = torch.cuda.Event() if self.device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def records() -> dict[str, Record]:
            if copied is not None:
                copied.synchronize()
            return {
                request_id: (
                    positions,
                    int(counted) == positions,
                    _to_bytes(mean),
                    _to_bytes(last),
                    _to_bytes(evidence),
                )
                for request_id, (positions, (counted, mean, last, evidence)) in found.items()
            }

        return records

    def _allocate(self) -> BlockSums:
        config = self.model_runner.kv_cache_config
        group = config.kv_cache_groups[full_attention_group(config)]
        self._layer = group.layer_names[0]
        block_size = group.kv_cache_spec.block_size
        self._evidence = SlotEvidence(config.num_blocks, block_size, self.device)
        self.model_runner.sampler = _Overheard(self.model_runner.sampler, self._heard)
        hidden_size = self.vllm_config.model_config.get_hidden_size()
        return BlockSums(config.num_blocks, block_size, hidden_size, self.device)


class _Overheard:
    """vLLM's sampler. heard: is called with the logits it was given, unchanged, and what it drew."""

    def __init__(self, sampler: Any, heard: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._sampler = sampler
        self._heard = heard

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = logits.clone() if logits.dtype == torch.float32 else logits  # float32 is changed in place
        output = self._sampler(logits, *args, **kwargs)
        self._heard(kept, output.sampled_token_ids)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def _logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Of any rows: past vLLM's adapter layer, which takes the sampled ones alone. No adapter reaches the LM head."""
    layer = getattr(getattr(model, "logits_processor", None), "base_layer", None)
    if layer is None:
        logits: torch.Tensor = model.compute_logits(states)
    else:
        logits = layer(getattr(model.lm_head, "base_layer", model.lm_head), states)
    return logits


def _deliver(output: Any, records: Callable[[], dict[str, Record]]) -> None:
    """Puts the records on vLLM's output, or on the one that is still to come."""
    if not hasattr(output, "get_output"):
        setattr(output, KEY, records())
        return
    get_output = output.get_output

    def with_records() -> Any:
        result = get_output()
        setattr(result, KEY, records())
        return result

    output.get_output = with_records  # the instance's: vLLM asks for its type


class _unfinished_prompts_draw_nothing:
    """vLLM's first model runner samples for half-computed prompts too, discards that token and winds the request's
    random generator back. A CPU generator cannot be wound back, and the attempt ends the engine (seen with vLLM 0.32:
    any request with a seed whose prompt is computed in chunks). So such rows draw from the common generator instead.
    """

    def __init__(self, model_runner: Any) -> None:
        self._generators: dict[int, torch.Generator] = {}
        self._kept: dict[int, torch.Generator] = {}
        if generators := getattr(getattr(model_runner, "input_batch", None), "generators", None):
            discarded = model_runner.discard_request_mask.np[: model_runner.input_batch.num_reqs]
            self._generators = generators
            self._kept = {i: g for i, g in generators.items() if discarded[i] and g.device.type == "cpu"}

    def __enter__(self) -> None:
        for index in self._kept:
            del self._generators[index]

    def __exit__(self, *_: object) -> None:
        self._generators.update(self._kept)


def _to_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Without waiting for the device."""
    pinned = device.type == "cuda"
    return torch.tensor(numbers, pin_memory=pinned).to(device, non_blocking=True)


def _to_bytes(vector: torch.Tensor) -> bytes:
    return vector.numpy().tobytes()
