"""What capture asks of vLLM's scheduler and KV cache, on vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import RequestStatus

from candor.engine.vllm_scheduler import (
    KEY,
    PROMPT_KEY,
    SchedulerCapture,
    full_attention_group,
    keep_whole_sequences,
)

SIZES: dict[str, Any] = {"block_size": 4, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**SIZES), SlidingWindowSpec(**SIZES, sliding_window=6)
MAMBA = MambaSpec(block_size=4, shapes=((2, 2),), dtypes=(torch.float32,))

pytestmark = pytest.mark.model


def config(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


def test_windows_alone_are_kept_as_full_attention_with_that_window() -> None:
    kept = keep_whole_sequences({"a": WINDOW, "b": WINDOW, "c": MAMBA})
    assert kept == {"a": FullAttentionSpec(**SIZES, sliding_window=6), "b": kept["a"], "c": MAMBA}
    assert full_attention_group(config(kept["c"], kept["a"])) == 1


def test_windows_beside_full_attention_stay() -> None:
    specs = {"a": WINDOW, "b": FULL}
    assert keep_whole_sequences(specs) == specs
    assert full_attention_group(config(WINDOW, FULL)) == 1


def test_layers_of_several_sizes_count_as_what_they_are() -> None:
    wide = FullAttentionSpec(**{**SIZES, "num_kv_heads": 2})
    together = UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"a": FULL, "b": wide})
    assert full_attention_group(config(WINDOW, together)) == 1
    windows = UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"a": WINDOW, "b": WINDOW})
    with pytest.raises(ValueError, match="no full-attention layer"):
        full_attention_group(config(windows, MAMBA))


def test_blocks_are_noted_when_they_are_handed_out_but_not_from_the_prefix_cache() -> None:
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=4)
    scheduler = SimpleNamespace(_fresh=[])
    SchedulerCapture._watch_new_blocks(scheduler, pool)  # type: ignore[arg-type]
    first = pool.get_new_blocks(2)
    assert scheduler._fresh == [block.block_id for block in first]
    pool.free_blocks(first)
    pool.touch(first)  # what a prefix-cache hit does
    assert len(scheduler._fresh) == 2
    pool.get_new_blocks(1)
    assert len(scheduler._fresh) == 3


BLOCKS, PROMPT, TAG = [7, 2, 5], [3] * 6, [8, 9]
CLOSING, END, OTHER_END, MOST = [6, *TAG], 0, 10, 7


class Steps:
    """vLLM's scheduler of one request, as far as capture looks at it."""

    def __init__(
        self, *, asks: bool = True, speculates: bool = False, closing: bool = False, tag: list[int] = TAG
    ) -> None:
        wish = {"tag": tag, "first": None, "evidence": False, "prompt": asks}
        wish |= {"closing": CLOSING if closing else []}
        self.request = SimpleNamespace(
            request_id="a",
            sampling_params=SimpleNamespace(
                extra_args={KEY: wish}, eos_token_id=END, stop_token_ids=[OTHER_END]
            ),
            stop_reason=None,
            append_output_token_ids=self.append,
            num_prompt_tokens=len(PROMPT),
            num_computed_tokens=0,
            output_token_ids=[],
            status="running",
        )
        self.requests = {"a": self.request}
        self.kv_cache_manager = SimpleNamespace(get_block_ids=lambda _: [BLOCKS])
        # What SchedulerCapture's start finds out.
        self._group, self._block_size, self._fresh, self._speculates = 0, 4, [], speculates
        self._closes = closing

    def append(self, tokens: list[int]) -> None:
        self.request.output_token_ids += tokens
        self.request.num_output_tokens = len(self.request.output_token_ids)

    def schedule(self, count: int) -> Any:
        self.request.num_computed_tokens += count
        return SimpleNamespace(num_scheduled_tokens={"a": count})

    def update_from_output(self, _: Any, output: Any) -> Any:
        tokens, stopped = self._update_request_with_output(self.request, output.tokens)
        outputs = [
            SimpleNamespace(
                request_id="a", finish_reason="stop" if stopped else None, kv_transfer_params=None
            )
        ]
        self.sent = tokens
        return {0: SimpleNamespace(outputs=outputs if tokens or stopped else [])}

    def _update_request_with_output(self, request: Any, tokens: list[int]) -> tuple[list[int], bool]:
        self.append(tokens)
        longest = request.num_output_tokens == MOST
        if longest:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return tokens, longest


class OneRequest(SchedulerCapture, Steps):  # type: ignore[misc]
    def __init__(self, **how: Any) -> None:
        Steps.__init__(self, **how)
        self.request.num_output_tokens = 0

    def plan(self, count: int) -> Any:
        return self.schedule(count)

    def came(self, planned: Any, *tokens: int) -> Any:
        """What vLLM sends on after the step that gave `tokens`."""
        records = {name: report for name, report in getattr(planned, KEY).reports.items()}
        sent = self.update_from_output(planned, SimpleNamespace(tokens=list(tokens), **{KEY: records}))
        return [(one.finish_reason, one.kv_transfer_params) for one in sent[0].outputs]


def reports(planned: Any) -> Any:
    return getattr(planned, KEY).reports


def test_a_prompt_reports_in_the_step_that_ends_it_and_does_not_end_there() -> None:
    scheduler = OneRequest()
    chunk = scheduler.plan(4)
    assert reports(chunk) == {}
    assert scheduler.came(chunk) == []
    due = (BLOCKS[:2], 6, 6)  # a sequence that ends where its response begins
    end = scheduler.plan(2)
    assert reports(end) == {"a": due}
    assert scheduler.came(end, TAG[0]) == [(None, {PROMPT_KEY: due})]
    assert scheduler.request.status == "running"
    for fed, drawn in ((6, TAG[1]), (7, 1)):  # the tag's last token is fed in the second of them
        step = scheduler.plan(1)
        whole = {"a": (BLOCKS[: -(-(fed + 1) // 4)], fed + 1, 6)} if fed == 7 else {}
        assert reports(step) == whole
        expected = ("stop", {KEY: whole["a"]}) if whole else (None, None)
        assert scheduler.came(step, drawn) == [expected]


def test_options_are_asked_for_in_the_step_that_ends_the_prompt_alone() -> None:
    scheduler = OneRequest()
    scheduler.request.sampling_params.extra_args[KEY]["options"] = [5, 2]
    asked = []
    for count, tokens in ((4, []), (2, [TAG[0]]), (1, [TAG[1]]), (1, [1])):
        step = scheduler.plan(count)
        asked.append(getattr(step, KEY).options)
        scheduler.came(step, *tokens)
    assert asked == [{}, {"a": [5, 2]}, {}, {}]


def test_a_step_planned_before_the_prompt_s_is_seen_says_nothing_of_it() -> None:
    """As with asynchronous scheduling."""
    scheduler = OneRequest()
    end, ahead = scheduler.plan(6), scheduler.plan(1)
    assert reports(end) == {"a": (BLOCKS[:2], 6, 6)}
    assert reports(ahead) == {}
    assert scheduler.came(end, 1) == [(None, {PROMPT_KEY: (BLOCKS[:2], 6, 6)})]
    assert scheduler.came(ahead, 1) == [(None, None)]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_prompt_that_is_fed_again_reports_only_if_its_first_token_never_came(arrived: bool) -> None:
    scheduler = OneRequest()
    end = scheduler.plan(6)
    if arrived:
        scheduler.came(end, 1)
    scheduler.request.num_computed_tokens = 0  # preempted; else what was on its way is dropped
    assert bool(reports(scheduler.plan(6))) != arrived


def test_a_prompt_reports_only_if_asked() -> None:
    scheduler = OneRequest(asks=False)
    end = scheduler.plan(6)
    assert reports(end) == {}
    assert scheduler.came(end, 1) == [(None, None)]


def test_what_vllm_joins_keeps_the_prompt_s_record() -> None:
    pytest.importorskip("candor.engine.vllm_engine")  # which sees to it
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    sent = [{PROMPT_KEY: "prompt"}, None, {KEY: "answer"}]
    for token, records in enumerate(sent):
        completion = CompletionOutput(0, str(token), [token], None, None)
        queue.put(RequestOutput("a", None, PROMPT, None, [completion], False, kv_transfer_params=records))
    joined = queue.get_nowait()
    assert joined.outputs[0].text == "012"
    assert joined.kv_transfer_params == {PROMPT_KEY: "prompt", KEY: "answer"}


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([[5, *TAG, 1, 4]], [5, *TAG, 1]),
        ([[5, TAG[0]], [TAG[1], 1, 4]], [5, *TAG, 1]),
        ([[5, *TAG], [1, 4]], [5, *TAG, 1]),
        ([[*TAG, 1, *TAG, 1]], [*TAG, 1]),
    ],
    ids=["within a step", "over two", "at a step's end", "twice"],
)
def test_with_speculation_an_answer_ends_after_its_tag_and_does_not_report(
    steps: list[list[int]], kept: list[int]
) -> None:
    scheduler = OneRequest(speculates=True)
    first = scheduler.plan(6)
    assert list(reports(first)) == ["a"]  # the prompt's
    scheduler.came(first, steps[0][0])
    steps[0] = steps[0][1:]
    for number, tokens in enumerate(steps, 1):
        step = scheduler.plan(len(tokens))
        assert reports(step) == {}
        ((reason, record),) = scheduler.came(step, *tokens)
        assert record is None
        assert (reason == "stop") == (number == len(steps))
    assert scheduler.request.output_token_ids == kept


@pytest.mark.parametrize("tag", [TAG, [-1]], ids=["", "grammar"])  # under a grammar no tag is looked for
@pytest.mark.parametrize(
    ("answer", "last", "status", "reason"),
    [
        ([5, 4], END, RequestStatus.FINISHED_STOPPED, None),
        ([5, 4], OTHER_END, RequestStatus.FINISHED_STOPPED, OTHER_END),
        ([5, 4, 5, 4, 5, 4], 4, RequestStatus.FINISHED_LENGTH_CAPPED, None),
    ],
    ids=["end token", "another end token", "longest"],
)
def test_an_answer_that_ends_without_a_tag_is_closed_in_the_same_request(
    answer: list[int], last: int, status: RequestStatus, reason: int | None, tag: list[int]
) -> None:
    scheduler = OneRequest(closing=True, tag=tag)
    scheduler.came(scheduler.plan(6), answer[0])
    for token in answer[1:]:
        assert scheduler.came(scheduler.plan(1), token) == [(None, None)]
    step = scheduler.plan(1)
    assert getattr(step, KEY).closed == {}
    ended = status == RequestStatus.FINISHED_STOPPED
    assert scheduler.came(step, last) == ([] if ended else [(None, None)])  # an end token is held back
    assert scheduler.request.status == RequestStatus.RUNNING

    kept = [*answer] if ended else [*answer, last]
    assert scheduler.request.output_token_ids == [*kept, *CLOSING]
    whole = len(PROMPT) + len(kept) + len(CLOSING)
    fed = scheduler.plan(whole - scheduler.request.num_computed_tokens)
    assert getattr(fed, KEY).closed == {"a": (len(kept), CLOSING)}
    due = (BLOCKS[: -(-whole // 4)], whole, len(PROMPT))
    assert reports(fed) == {"a": due}
    assert scheduler.came(fed, 1) == [("stop", {KEY: due})]
    assert scheduler.sent == ([last] if ended else [])  # the token after the tag is dropped
    assert (scheduler.request.status, scheduler.request.stop_reason) == (status, reason)


def test_closing_that_takes_two_steps_is_told_once_and_reports_in_the_second() -> None:
    scheduler = OneRequest(closing=True)
    scheduler.came(scheduler.plan(6), 5)
    assert scheduler.came(scheduler.plan(1), END) == []
    first = scheduler.plan(1)
    assert getattr(first, KEY).closed == {"a": (1, CLOSING)}
    assert reports(first) == {}
    second = scheduler.plan(2)
    assert getattr(second, KEY).closed == {}
    assert list(reports(second)) == ["a"]


def test_a_tag_of_its_own_and_an_empty_answer_are_not_closed() -> None:
    tagged = OneRequest(closing=True)
    for token, count in ((TAG[0], 6), (TAG[1], 1)):
        tagged.came(tagged.plan(count), token)
    fed = tagged.plan(1)
    ((reason, record),) = tagged.came(fed, END)
    assert reason == "stop"
    assert record == {KEY: reports(fed)["a"]}
    assert getattr(tagged.plan(0), KEY).closed == {}
    empty = OneRequest(closing=True)
    empty.came(empty.plan(6), END)
    assert empty.request.output_token_ids == [END]
