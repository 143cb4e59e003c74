"""Runs inside vLLM's worker: keeps each step's hidden states and evidence, and reports for the requests that are due.

It tracks vLLM 0.32 (0.16 to 0.33 have the same seams), with both of its model runners, synchronous or not:
- between `execute_model` and `sample_tokens`, the runner's `execute_model_state` holds the states that go to the LM
  head, already normed and outside compiled code, and the slots of the step's keys and values;
- the runner's `sampler` takes the model's logits and returns the drawn tokens as `sampled_token_ids`;
- a grammar masks the logits in place before the sampler has them: the first runner in `sample_tokens`, the second by
  its `structured_outputs_worker`;
- the sampler exists once the worker's `load_model` is done; rows with draft tokens go to `rejection_sampler` instead;
- the engine reads the output of one worker alone, the first of the last pipeline stage (`_get_output_rank`);
- `initialize_from_config` tells a worker its blocks, from the memory that `determine_available_memory` leaves;
- `sample_tokens` returns a ModelRunnerOutput, or an object whose `get_output` gives one later.

The data belong to the KV cache: sums of states per block (engine/block_sums.py), evidence per slot
(engine/slot_evidence.py). The device does index arithmetic only, and nothing waits for it: reports are copied to the
host after the step's own work, and are read when vLLM reads the step's tokens.

Each step is only copied at first, and several steps are entered together: each of about thirty small operations costs
as much for sixteen rows as for one (a millisecond in all; a step of a small model takes ten on a CPU, two on a GPU).
The result is the same as long as no slot is in two of the steps, so they are entered before a block can change its
owner: one is given out again once its request has finished or was preempted, and the step says so. For the same
reason all reports of a step are read, packed and copied together.

One mixin serves vLLM's CPU and GPU workers. These have their own files, since the CPU worker must be imported before
the rest of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from candor.engine.block_sums import BlockSums, bytes_of_sums
from candor.engine.frame_stack import with_room
from candor.engine.slot_evidence import SlotEvidence, bytes_of_evidence, predecessors
from candor.engine.start_failures import report_here
from candor.engine.vllm_scheduler import KEY, StepPlan, full_attention_group, keep_whole_sequences

Record = tuple[int, bool, bytes, bytes, bytes]
"""(positions, whether all were counted, mean (H,), last state (H,), evidence (T, 3)); tensors as float32 bytes.

Where options were asked for, their log-probabilities (K,) stand in the evidence's place."""


SCORED_ROWS = 128
"""Rows of logits computed together for given tokens: 78 MB with a vocabulary of 152,000, plus some copies."""

WAITING_ROWS = 16
"""Waiting tokens at which steps are entered. Each sampled one keeps its row of logits until then."""
WAITING_BYTES = 1 << 26
"""Of logits, on a GPU, where more tokens wait: what entering costs there is the launches, not the rows."""


@dataclass
class _Step:
    """One step; the rows of `hidden` (R, H) float32 and `slots` (R,) are its tokens, request after request.

    starts: first row of each request, then the end of the last; each request samples from its last row, and
    from those of its draft tokens.
    drawn: slots of those rows (n,), drawn tokens (n,) and their logits (n, V); None if no request needs them.
    logits: (n, V) and, by request, the first row of its own; None likewise.
    unmasked: (n, V), the logits before a grammar masked them; None where none does, or no evidence is wanted.
    """

    wanted: StepPlan
    hidden: torch.Tensor
    slots: torch.Tensor
    requests: Sequence[str]
    starts: Any
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    logits: tuple[torch.Tensor, Sequence[int]] | None = None
    unmasked: torch.Tensor | None = None

    def rows_of(self, request_id: str) -> tuple[int, int]:
        """The request's first and last row."""
        number = self.requests.index(request_id)
        return int(self.starts[number]), int(self.starts[number + 1]) - 1


class WorkerCapture:
    """A worker that keeps each step's states and evidence and reports for the requests that are due."""

    model_runner: Any
    vllm_config: Any
    rank: int
    device: torch.device
    _sums: BlockSums
    _evidence: SlotEvidence
    _layer: str
    _step: _Step | None = None
    _waiting: list[_Step]
    _fresh: list[int]
    _most_waiting: int
    _block_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        report_here()
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        # Before vLLM measures how much memory a step takes: float32 logits are copied.
        runner = self.model_runner
        if self._reports:
            runner.sampler = _ObservedSampler(runner.sampler, self._note_drawn)
        if self._reports and getattr(runner, "rejection_sampler", None) is not None:
            runner.rejection_sampler = _ObservedRejection(runner.rejection_sampler, self._note_accepted)
        if self._reports and getattr(runner, "structured_outputs_worker", None) is not None:
            runner.structured_outputs_worker = _ObservedMasks(
                runner.structured_outputs_worker, self._note_unmasked
            )

    def get_kv_cache_spec(self) -> Any:
        return keep_whole_sequences(super().get_kv_cache_spec())  # type: ignore[misc]

    def determine_available_memory(self) -> int:
        """Subtracts the memory of sums and evidence, if vLLM chooses the KV cache's size."""
        available: int = super().determine_available_memory()  # type: ignore[misc]
        if self.vllm_config.cache_config.kv_cache_memory_bytes is not None:
            return available
        groups = get_kv_cache_groups(self.vllm_config, dict(self.get_kv_cache_spec()))
        block = max(map(_bytes_of_block, groups))  # the groups' layers share it
        kept = bytes_of_sums(self._hidden_size) + bytes_of_evidence(
            max(group.kv_cache_spec.block_size for group in groups)
        )
        return available * block // (block + kept)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        self._allocate()

    @with_room
    def execute_model(self, scheduler_output: Any) -> Any:
        wanted = getattr(scheduler_output, KEY, None) or StepPlan()
        if scheduler_output.finished_req_ids or scheduler_output.preempted_req_ids:
            self._enter()  # this step may write to blocks of another request
        if self._reports:
            self._fresh += wanted.fresh
        for request_id, closing in wanted.closed.items():
            self._put(request_id, *closing)
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        state = self.model_runner.execute_model_state
        # Each tensor rank of the last stage computes its part of the logits; the stages before have no states.
        needed = self._reports or (wanted.scored and self._in_last_stage)
        if state is not None and needed and scheduler_output.total_num_scheduled_tokens:
            self._step = self._look(scheduler_output, state, wanted)
        return result

    @with_room
    def sample_tokens(self, grammar_output: Any) -> Any:
        logits = getattr(self.model_runner.execute_model_state, "logits", None)  # the first runner's
        if grammar_output is not None and logits is not None:
            self._note_unmasked(logits)
        with _unfinished_prompts_draw_nothing(self.model_runner):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        step, self._step = self._step, None
        if step is not None:
            wanted = step.wanted
            if self._reports:
                self._waiting.append(step)
                rows = sum(len(one.slots) for one in self._waiting)
                if wanted.scored or wanted.reports or rows >= self._most_waiting:
                    self._enter()
            for request_id, (offset, tokens) in wanted.scored.items():
                self._score(step, request_id, offset, tokens)
            if wanted.reports and self._reports:
                _deliver(output, self._report(step))
        return output

    def _put(self, request_id: str, kept: int, tokens: list[int]) -> None:
        """Has vLLM's first model runner feed these tokens after the answer's first `kept`."""
        runner = self.model_runner
        request, batch = runner.requests[request_id], runner.input_batch
        request.output_token_ids[kept:] = tokens
        row = batch.req_id_to_index.get(request_id)
        if row is not None:  # else vLLM copies them when the request enters the batch again
            begin = batch.num_prompt_tokens[row] + kept
            batch.token_ids_cpu[row, begin : begin + len(tokens)] = tokens
            batch.is_token_ids[row, begin : begin + len(tokens)] = True
            batch.num_tokens_no_spec[row] = begin + len(tokens)

    def _look(self, scheduler_output: Any, state: Any, wanted: StepPlan) -> _Step:
        """Copies the step's rows: vLLM overwrites its states and slots in the next step."""
        rows = scheduler_output.total_num_scheduled_tokens
        batch = getattr(state, "input_batch", None)
        if batch is None:  # vLLM's first model runner
            batch, starts = self.model_runner.input_batch, self.model_runner.query_start_loc.np
            mappings = state.slot_mappings
        else:
            mappings, starts = state.slot_mappings_by_layer, batch.query_start_loc_np
        hidden = state.hidden_states[:rows].to(torch.float32, copy=True)
        slots = mappings[self._layer][:rows].to(torch.int64, copy=True)
        return _Step(wanted, hidden, slots, batch.req_ids, starts)

    def _note_unmasked(self, logits: torch.Tensor) -> None:
        """logits: (n, V), before a grammar masks them in place. Evidence is of the model's own probabilities, as it
        is where the same response is given."""
        if self._reports and self._step is not None and self._step.wanted.evidence:
            self._step.unmasked = logits.clone()

    def _note_drawn(self, logits: torch.Tensor, sampled: torch.Tensor) -> None:
        """logits: (n, V), as the sampler got them. sampled: (n, 1), the drawn tokens."""
        step = self._step
        if step is None:
            return
        logits = logits if step.unmasked is None else step.unmasked
        if step.wanted.options:
            step.logits = logits, range(len(logits))
        if step.wanted.evidence:
            slots, number = step.slots, len(logits)
            if number < len(slots):  # else each request has one row
                last = [int(start) - 1 for start in step.starts[1 : number + 1]]
                slots = slots[_to_device(last, self.device)]
            step.drawn = slots, sampled[:, 0], logits

    def _note_accepted(self, logits: torch.Tensor, sampled: torch.Tensor, drafts: Sequence[int]) -> None:
        """logits: (n, V), as the sampler got them: each request's last row before its drafts, then its drafts'.

        sampled: (requests, most drafts + 1), the tokens after those rows, -1 after the first that was not accepted.
        drafts: draft tokens of each request. The row of a rejected draft counts for nothing.
        """
        step = self._step
        if step is None:
            return
        logits = logits if step.unmasked is None else step.unmasked
        ends = [int(end) for end in step.starts[1 : len(drafts) + 1]]
        rows = [row for end, count in zip(ends, drafts, strict=True) for row in range(end - count - 1, end)]
        firsts = [at * sampled.shape[1] + i for at, count in enumerate(drafts) for i in range(count + 1)]
        row, tokens = _to_device(rows, self.device), sampled.flatten()[_to_device(firsts, self.device)]
        slots = torch.where(tokens < 0, -1, step.slots[row])
        step.slots[row] = slots
        if step.wanted.options:
            firsts_of = [sum(drafts[:at]) + at for at in range(len(drafts))]
            step.logits = logits, firsts_of
        if step.wanted.evidence:
            step.drawn = slots, tokens.clamp_min(0), logits

    def _enter(self) -> None:
        """Enters the waiting steps into sums and evidence, after what their new blocks held is cleared."""
        if not self._waiting:
            return
        steps, self._waiting = self._waiting, []
        if self._fresh:
            fresh = _to_device(self._fresh, self.device)
            self._sums.clear(fresh)
            self._evidence.clear_blocks(fresh)
            self._fresh = []
        places = self._evidence.places(torch.cat([step.slots for step in steps]))
        self._sums.add([step.hidden for step in steps], places)
        self._evidence.clear(places)
        if drawn := [step.drawn for step in steps if step.drawn is not None]:
            slots, tokens, logits = map(torch.cat, zip(*drawn, strict=True))
            self._evidence.write(self._evidence.places(slots), tokens, logits)

    def _score(self, step: _Step, request_id: str, offset: int, tokens: list[int]) -> None:
        """Writes the evidence of tokens that are fed instead of sampled."""
        start = step.rows_of(request_id)[0] + offset
        for at in range(0, len(tokens), SCORED_ROWS):
            some = tokens[at : at + SCORED_ROWS]
            rows = slice(start + at, start + at + len(some))
            states = step.hidden[rows].to(self.vllm_config.model_config.dtype)  # exact: it was this dtype
            logits = _logits(self.model_runner.model, states)
            if self._reports:
                self._evidence.write(step.slots[rows], _to_device(some, self.device), logits)

    def _report(self, step: _Step) -> Callable[[], dict[str, Record]]:
        """Starts copying the due reports to the host, all at once; the returned function waits for them."""
        due, options = step.wanted.reports, step.wanted.options
        blocks = [block for own, _, _ in due.values() for block in own]
        rows = [step.rows_of(request_id)[1] for request_id in due]
        places = {
            request_id: predecessors(own, self._block_size, first, positions)
            for request_id, (own, positions, first) in due.items()
            if request_id not in options
        }
        asked = {one: self._option_logprobs(step, one, options[one]) for one in due if one in options}
        index = _to_device([*blocks, *rows, *chain(*places.values())], self.device)
        of_blocks, of_rows, of_places = index.tensor_split([len(blocks), len(blocks) + len(rows)])
        totals = self._sums.totals(of_blocks, [len(own) for own, _, _ in due.values()])
        last, evidence = step.hidden[of_rows], self._evidence.read(of_places)
        sizes = [
            *[totals.shape[1]] * len(due),
            *[last.shape[1]] * len(due),
            *[3 * len(slots) for slots in places.values()],
            *[len(logprobs) for logprobs in asked.values()],
        ]
        parts = [totals, last, evidence, *asked.values()]
        copied = torch.cat([part.flatten() for part in parts]).to("cpu", non_blocking=True)
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()

        def records() -> dict[str, Record]:
            if done is not None:
                done.synchronize()
            pieces = copied.split(sizes)
            measured = dict(zip([*places, *asked], pieces[2 * len(due) :], strict=True))
            found = {}
            states = zip(due.items(), pieces, pieces[len(due) :], strict=False)
            for (request_id, (_, positions, _)), total, row in states:
                mean, complete = total[:-1] / positions, int(total[-1]) == positions
                parts_of_it = _to_bytes(mean), _to_bytes(row), _to_bytes(measured[request_id])
                found[request_id] = positions, complete, *parts_of_it
            return found

        return records

    def _option_logprobs(self, step: _Step, request_id: str, options: list[int]) -> torch.Tensor:
        """(K,) float32, after the request's last row; a request with a report of its prompt has no drafts."""
        assert step.logits is not None  # the step's sampler ran before
        logits, firsts = step.logits
        row = logits[firsts[step.requests.index(request_id)]].float()
        return torch.log_softmax(row, dim=-1)[_to_device(options, self.device)]

    def _allocate(self) -> None:
        """Allocates at start-up, so that a lack of memory shows before the server reports ready."""
        self._waiting, self._fresh = [], []
        config = self.model_runner.kv_cache_config
        group = config.kv_cache_groups[full_attention_group(config)]
        if not self._in_last_stage:
            return
        if not group.layer_names:
            raise ValueError(
                "the last pipeline stage has no full-attention layer, whose KV blocks hold the whole sequence; use "
                "--tensor-parallel-size, or fewer stages"
            )
        self._layer = group.layer_names[0]
        if not self._reports:
            return
        self._most_waiting = WAITING_ROWS
        if self.device.type != "cpu":
            row = 4 * int(self.vllm_config.model_config.get_vocab_size())
            self._most_waiting = max(WAITING_ROWS, WAITING_BYTES // row)
        self._block_size = group.kv_cache_spec.block_size
        self._sums = BlockSums(config.num_blocks, self._block_size, self._hidden_size, self.device)
        self._evidence = SlotEvidence(config.num_blocks, self._block_size, self.device)

    @property
    def _in_last_stage(self) -> bool:
        parallel = self.vllm_config.parallel_config
        return bool(self.rank >= parallel.world_size - parallel.tensor_parallel_size)

    @property
    def _reports(self) -> bool:
        """Whether the engine reads this worker's output: the first of the last stage."""
        parallel = self.vllm_config.parallel_config
        return bool(self.rank == parallel.world_size - parallel.tensor_parallel_size)

    @property
    def _hidden_size(self) -> int:
        config = self.vllm_config.model_config
        size: int = getattr(config.hf_text_config, "word_embed_proj_dim", None) or config.get_hidden_size()
        return size


class _ObservedSampler:
    """Wraps vLLM's sampler. drawn: called with the sampler's unmodified logits and the tokens it drew."""

    def __init__(self, sampler: Any, drawn: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._sampler = sampler
        self._note_drawn = drawn

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = logits.clone() if logits.dtype == torch.float32 else logits  # float32 is changed in place
        output = self._sampler(logits, *args, **kwargs)
        self._note_drawn(kept, output.sampled_token_ids)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


class _ObservedRejection:
    """Wraps vLLM's rejection sampler. accepted: called with its unmodified logits, its tokens, the draft counts."""

    def __init__(
        self, sampler: Any, accepted: Callable[[torch.Tensor, torch.Tensor, Sequence[int]], None]
    ) -> None:
        self._sampler = sampler
        self._note_accepted = accepted

    def __call__(
        self, metadata: Any, draft_probs: Any, logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        kept = logits.clone()
        output = self._sampler(metadata, draft_probs, logits, *args, **kwargs)
        self._note_accepted(kept, output.sampled_token_ids, metadata.num_draft_tokens)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


class _ObservedMasks:
    """Wraps what masks logits by grammars in vLLM's second runner. masked: called with them before."""

    def __init__(self, masks: Any, masked: Callable[[torch.Tensor], None]) -> None:
        self._masks = masks
        self._note_unmasked = masked

    def apply_grammar_bitmask(self, logits: torch.Tensor, *args: Any) -> None:
        self._note_unmasked(logits)
        self._masks.apply_grammar_bitmask(logits, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._masks, name)


def _bytes_of_block(group: Any) -> int:
    """Bytes of one KV cache block, for all layers of a group."""
    spec = group.kv_cache_spec
    layers = 1 if isinstance(spec, UniformTypeKVCacheSpecs) else len(group.layer_names)
    return int(spec.page_size_bytes) * layers


def _logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits of any rows. It bypasses vLLM's adapter layer (sampled rows only); no adapter changes the LM head."""
    layer = getattr(getattr(model, "logits_processor", None), "base_layer", None)
    if layer is None:
        logits: torch.Tensor = model.compute_logits(states)
    else:
        logits = layer(getattr(model.lm_head, "base_layer", model.lm_head), states)
    return logits


def _deliver(output: Any, records: Callable[[], dict[str, Record]]) -> None:
    """Attaches the records to vLLM's output, or to the one that `get_output` gives later."""
    if not hasattr(output, "get_output"):
        setattr(output, KEY, records())
        return
    get_output = output.get_output

    def with_records() -> Any:
        result = get_output()
        setattr(result, KEY, records())
        return result

    output.get_output = with_records  # on the instance: vLLM checks the output's type


class _unfinished_prompts_draw_nothing:
    """vLLM's first model runner samples for partly computed prompts too, drops that token and rewinds the request's
    random generator. A CPU generator cannot be rewound, and the attempt ends the engine (seen with vLLM 0.32:
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
    """Copies without waiting for the device."""
    pinned = device.type == "cuda"
    return torch.tensor(numbers, pin_memory=pinned).to(device, non_blocking=True)


def _to_bytes(vector: torch.Tensor) -> bytes:
    return vector.numpy().tobytes()
