"""Capture in the worker, on stand-ins for vLLM's two model runners: what they leave after a step, and nothing else.

With a GPU the same steps run there, under CUDA's own check that nothing waits for the device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from candor.engine.slot_evidence import of_answer

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from candor.engine import vllm_capture
from candor.engine.vllm_capture import WorkerCapture
from candor.engine.vllm_scheduler import KEY, StepPlan

SIZE, HIDDEN, WORDS = 4, 6, 50
BLOCKS = {"a": [7, 2, 5, 0], "b": [1, 6, 3, 4], "heir": [2, 7]}
PROMPTS = {"a": 6, "b": 3}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device is here"),
        ],
    ),
]

pytestmark = pytest.mark.model


def spec(heads: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=SIZE, num_kv_heads=heads, head_size=1, dtype=torch.float32)


class Later:
    """What vLLM gives with asynchronous scheduling."""

    def __init__(self, output: SimpleNamespace) -> None:
        self._output = output

    def get_output(self) -> SimpleNamespace:
        return self._output


def _mask(logits: torch.Tensor, likelier: int) -> None:
    """As a grammar: in place, it leaves every word but the likeliest ones."""
    logits.scatter_(1, logits.topk(likelier, dim=1).indices, -torch.inf)


class Runner:
    """Either of vLLM's model runners, as far as capture looks at them. second: the newer one."""

    def __init__(self, device: torch.device, *, second: bool) -> None:
        self.device, self.second = device, second
        self.generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(HIDDEN, WORDS, generator=self.generator).to(device)
        self.model = SimpleNamespace(compute_logits=lambda states: states @ self.head)
        group = SimpleNamespace(kv_cache_spec=spec(1), layer_names=["layer"])
        self.kv_cache_config = SimpleNamespace(num_blocks=8, kv_cache_groups=[group])
        self.execute_model_state: Any = None
        self.accepted: list[int] = []
        # As vLLM's own: each step writes over the last one's.
        self.states = torch.zeros(16, HIDDEN, device=device)
        self.slots = torch.full((16,), -1, device=device)
        self.structured_outputs_worker: Any = SimpleNamespace(apply_grammar_bitmask=_mask) if second else None

    def sampler(self, logits: torch.Tensor, metadata: object = None) -> SimpleNamespace:
        drawn = logits.argmax(1)
        logits.zero_()  # samplers change float32 logits in place
        return SimpleNamespace(sampled_token_ids=drawn.unsqueeze(1))

    def rejection_sampler(
        self, metadata: SimpleNamespace, _: object, logits: torch.Tensor, __: object
    ) -> SimpleNamespace:
        """Accepts as many drafts as `accepted` says of each request; draws after them."""
        table = torch.full((len(self.accepted), max(metadata.num_draft_tokens) + 1), -1, device=logits.device)
        row = 0
        for at, (drafts, taken) in enumerate(zip(metadata.num_draft_tokens, self.accepted, strict=True)):
            table[at, : taken + 1] = logits[row : row + taken + 1].argmax(1)
            row += drafts + 1
        logits.zero_()
        return SimpleNamespace(sampled_token_ids=table)


class Steps:
    """vLLM's worker."""

    model_runner: Runner
    later: bool

    def load_model(self) -> None:
        pass  # the runner has it already

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {"layer": spec(1), "other": spec(1)}

    def determine_available_memory(self) -> int:
        return 1 << 20

    def initialize_from_config(self, config: Any) -> None:
        self.model_runner.kv_cache_config = config

    def execute_model(self, step: Any) -> None:
        runner = self.model_runner
        counts = list(step.num_scheduled_tokens.values())
        slots = [
            BLOCKS[name][p // SIZE] * SIZE + p % SIZE
            for name, (first, count) in step.fed.items()
            for p in range(first, first + count)
        ]
        written = torch.tensor([*slots, -1, -1], pin_memory=runner.device.type == "cuda")
        runner.slots[: len(written)].copy_(written, non_blocking=True)
        runner.states[: len(step.hidden)] = step.hidden
        mapping = {"layer": runner.slots}
        starts = np.cumsum([0, *counts])
        starts_there = step.starts_there
        names = list(step.fed)
        if runner.second:
            batch = SimpleNamespace(req_ids=names, query_start_loc_np=starts)
            runner.execute_model_state = SimpleNamespace(
                input_batch=batch, slot_mappings_by_layer=mapping, hidden_states=runner.states
            )
        else:
            runner.input_batch = SimpleNamespace(req_ids=names, generators={})
            runner.query_start_loc = SimpleNamespace(np=starts)
            runner.execute_model_state = SimpleNamespace(slot_mappings=mapping, hidden_states=runner.states)
        self.last = starts_there[1:] - 1
        self.drafts = list(step.drafts.values())
        if not runner.second:
            runner.execute_model_state.logits = self.logits()

    def logits(self) -> torch.Tensor:
        runner, rows = self.model_runner, self.last
        if self.drafts:
            before = [range(-drafts, 1) for drafts in self.drafts]
            rows = torch.tensor(
                [int(last) + i for last, some in zip(rows, before, strict=True) for i in some]
            )
        return runner.model.compute_logits(runner.execute_model_state.hidden_states[rows])

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner = self.model_runner
        logits = self.logits() if runner.second else runner.execute_model_state.logits
        if grammar_output is not None:
            mask = runner.structured_outputs_worker.apply_grammar_bitmask if runner.second else _mask
            mask(logits, grammar_output)
        runner.execute_model_state = None
        if self.drafts:
            metadata = SimpleNamespace(num_draft_tokens=self.drafts)
            drawn = runner.rejection_sampler(metadata, None, logits, None).sampled_token_ids
        else:
            drawn = runner.sampler(logits, None).sampled_token_ids
        output = SimpleNamespace(sampled_token_ids=drawn)
        return Later(output) if self.later else output


class Worker(WorkerCapture, Steps):
    def __init__(self, device: torch.device, *, second: bool, later: bool) -> None:
        self.device = device
        self.later = later
        self.rank = 0
        self.model_runner = Runner(device, second=second)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                get_hidden_size=lambda: HIDDEN,
                get_vocab_size=lambda: WORDS,
                hf_text_config=None,
                dtype=torch.float32,
            ),
            cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
            parallel_config=SimpleNamespace(world_size=1, tensor_parallel_size=1),
        )
        self.load_model()
        self.initialize_from_config(self.model_runner.kv_cache_config)


class Driver:
    """Feeds steps to a worker and keeps what every position showed and what was drawn there."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.states: dict[str, list[torch.Tensor]] = {name: [] for name in BLOCKS}
        self.drawn: dict[str, list[int]] = {name: [] for name in BLOCKS}

    def step(
        self,
        counts: dict[str, int],
        wanted: StepPlan,
        drafts: dict[str, int] | None = None,
        grammar: int | None = None,
        **gone: set[str],
    ) -> Any:
        """drafts: how many of each request's tokens are drafts. grammar: how many of the likeliest words it forbids.
        gone: `finished_req_ids` or `preempted_req_ids`."""
        device = self.worker.device
        hidden = torch.randn(sum(counts.values()) + 2, HIDDEN, generator=self.worker.model_runner.generator)
        scheduled = SimpleNamespace(
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            fed={name: (len(self.states[name]), count) for name, count in counts.items()},
            hidden=hidden.to(device),
            drafts=drafts or {},
            **{"finished_req_ids": set(), "preempted_req_ids": None, **gone},
            starts_there=torch.tensor(np.cumsum([0, *counts.values()])).to(device),
        )
        setattr(scheduled, KEY, wanted)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.worker.execute_model(scheduled)
            output = self.worker.sample_tokens(grammar)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        output = output.get_output() if self.worker.later else output
        row = 0
        for (name, count), drawn in zip(counts.items(), output.sampled_token_ids[:, 0].tolist(), strict=True):
            self.states[name] += hidden[row : row + count].unbind()
            self.drawn[name].append(drawn)
            row += count
        return output


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["first runner", "second runner"])
def second(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "second runner")


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_what_is_reported_is_what_the_steps_showed(device: torch.device, second: bool, later: bool) -> None:
    driver = Driver(Worker(device, second=second, later=later))
    measuring = StepPlan(evidence=True)
    driver.step({"a": 4}, measuring)  # a chunk: what is drawn here is dropped
    driver.drawn["a"].clear()
    driver.step({"a": 2, "b": 3}, measuring)
    for _ in range(4):
        driver.step({"b": 1, "a": 1}, measuring)
    due = StepPlan(reports={"a": (BLOCKS["a"][:3], 11, 6), "b": (BLOCKS["b"][:2], 9, 3)}, evidence=True)
    output = driver.step({"a": 1, "b": 1}, due)
    records = getattr(output, KEY)
    head = driver.worker.model_runner.head.cpu()
    # b counts one position more than were fed.
    for name, positions, complete in (("a", 11, True), ("b", 9, False)):
        n, whole, mean, last, kept = records[name]
        states = torch.stack(driver.states[name])
        assert (n, whole) == (positions, complete)
        assert torch.allclose(_floats(mean), states.sum(0) / positions, atol=1e-6)
        assert torch.equal(_floats(last), states[-1])
        answer = driver.drawn[name][: positions - PROMPTS[name]][:-1]
        found = of_answer(_floats(kept).view(-1, 3), answer)
        assert found is not None
        predicting = states[PROMPTS[name] - 1 :][: len(answer)]
        logprobs = (predicting @ head).log_softmax(1)
        own = logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert found[0] == pytest.approx((-own).tolist(), abs=1e-4)


def test_evidence_under_a_grammar_is_of_the_models_own_probabilities(
    device: torch.device, second: bool
) -> None:
    driver = Driver(Worker(device, second=second, later=False))
    measuring = StepPlan(evidence=True)
    driver.step({"a": 6}, measuring, grammar=2)
    for _ in range(3):
        driver.step({"a": 1}, measuring, grammar=2)
    output = driver.step({"a": 1}, StepPlan({"a": (BLOCKS["a"][:3], 10, 6)}, evidence=True))
    answer = driver.drawn["a"][:4]
    found = of_answer(_floats(getattr(output, KEY)["a"][4]).view(-1, 3), answer)
    assert found is not None
    states = torch.stack(driver.states["a"])[5:9]
    logprobs = (states @ driver.worker.model_runner.head.cpu()).log_softmax(1)
    own = logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert found[0] == pytest.approx((-own).tolist(), abs=1e-4)
    likeliest = logprobs.topk(3, dim=1).indices[:, 2]  # what the grammar leaves first
    assert answer == likeliest.tolist()


def test_a_given_response_is_measured_though_nothing_is_drawn(device: torch.device, second: bool) -> None:
    driver = Driver(Worker(device, second=second, later=False))
    response = [3, 14, 15, 9]  # positions 2 to 5 of six; the first chunk ends before the third of them
    driver.step({"a": 4}, StepPlan(scored={"a": (1, response[:3])}, evidence=True))
    wanted = StepPlan({"a": (BLOCKS["a"][:2], 6, 2)}, {"a": (0, response[3:])}, evidence=True)
    record = getattr(driver.step({"a": 2}, wanted), KEY)["a"]
    found = of_answer(_floats(record[4]).view(-1, 3), response)
    assert found is not None
    states = torch.stack(driver.states["a"])[1:5]
    logprobs = (states @ driver.worker.model_runner.head.cpu()).log_softmax(1)
    expected = -logprobs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    assert found[0] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_a_prompt_reports_before_its_answer_begins_in_the_same_block(
    device: torch.device, second: bool, later: bool
) -> None:
    driver = Driver(Worker(device, second=second, later=later))
    driver.step({"b": 1}, StepPlan(evidence=True))  # waits, as the chunk does
    driver.step({"a": 4}, StepPlan(evidence=True))
    prompts = {"a": (BLOCKS["a"][:2], 6, 6), "b": (BLOCKS["b"][:1], 3, 3)}
    records = getattr(driver.step({"a": 2, "b": 2}, StepPlan(reports=prompts, evidence=True)), KEY)
    due = StepPlan(reports={"a": (BLOCKS["a"][:2], 7, 6)}, evidence=True)
    answer = getattr(driver.step({"a": 1, "b": 1}, due), KEY)["a"]
    for name, length in PROMPTS.items():
        positions, whole, mean, last, kept = records[name]
        states = torch.stack(driver.states[name])[:length]
        assert (positions, whole, kept) == (length, True, b"")
        assert torch.allclose(_floats(mean), states.mean(0), atol=1e-6)
        assert torch.equal(_floats(last), states[-1])
    assert answer[1]
    assert torch.allclose(_floats(answer[2]), torch.stack(driver.states["a"]).mean(0), atol=1e-6)


def test_options_are_those_after_the_prompt_s_last_token(device: torch.device, second: bool) -> None:
    driver = Driver(Worker(device, second=second, later=False))
    driver.step({"a": 6}, StepPlan(evidence=True))
    due = {"a": (BLOCKS["a"][:2], 7, 6), "b": (BLOCKS["b"][:1], 3, 3)}
    records = getattr(
        driver.step({"a": 1, "b": 3}, StepPlan(due, options={"b": [5, 2, 9]}, evidence=True)), KEY
    )
    assert_options(driver, records["b"], [5, 2, 9])
    assert len(_floats(records["a"][4])) == 3  # an answer's evidence, as ever


def test_options_beside_drafts() -> None:
    driver = Driver(Worker(torch.device("cpu"), second=False, later=False))
    driver.step({"a": 6}, StepPlan())
    driver.worker.model_runner.accepted = [1, 0]
    wanted = StepPlan({"b": (BLOCKS["b"][:1], 3, 3)}, options={"b": [5, 2]})
    output = driver.step({"a": 4, "b": 3}, wanted, {"a": 3, "b": 0})
    assert_options(driver, getattr(output, KEY)["b"], [5, 2])


def assert_options(driver: Driver, record: Any, options: list[int]) -> None:
    positions, whole, mean, last, found = record
    states = torch.stack(driver.states["b"])
    assert (positions, whole) == (3, True)
    assert torch.allclose(_floats(mean), states.mean(0), atol=1e-6)
    assert torch.equal(_floats(last), states[-1])
    expected = (states[-1] @ driver.worker.model_runner.head.cpu()).log_softmax(0)[options]
    assert torch.allclose(_floats(found), expected, atol=1e-5)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "beside other steps"])
def test_rejected_drafts_count_for_nothing(waits: bool) -> None:
    """Speculation is served by the first runner alone."""
    driver = Driver(Worker(torch.device("cpu"), second=False, later=False))
    states, drawn = driver.states["a"], driver.drawn["a"]
    driver.step({"a": 6, "b": 3}, StepPlan(evidence=True))
    for taken in (1, 0, 2):  # of three drafts; positions up to 15, in four blocks
        if not waits:
            driver.worker._enter()
        driver.worker.model_runner.accepted = [0, taken]
        output = driver.step({"b": 1, "a": 4}, StepPlan(evidence=True), {"b": 0, "a": 3})
        drawn[-1:] = output.sampled_token_ids[1, : taken + 1].tolist()
        del states[len(states) - 3 + taken :]
    due = StepPlan({"a": (BLOCKS["a"], 13, 6), "b": (BLOCKS["b"][:2], 7, 3)}, evidence=True)
    records = getattr(driver.step({"b": 1, "a": 1}, due), KEY)
    for name, positions in (("a", 13), ("b", 7)):
        _, whole, mean, last, kept = records[name]
        assert whole
        assert torch.allclose(_floats(mean), torch.stack(driver.states[name]).mean(0), atol=1e-6)
        assert torch.equal(_floats(last), driver.states[name][-1])
        answer = driver.drawn[name][: positions - PROMPTS[name]]
        found = of_answer(_floats(kept).view(-1, 3), answer)
        assert found is not None
        predicting = torch.stack(driver.states[name])[PROMPTS[name] - 1 : -1]
        logprobs = (predicting @ driver.worker.model_runner.head).log_softmax(1)
        own = logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert found[0] == pytest.approx((-own).tolist(), abs=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_of_the_last_stage_s_two_ranks_one_keeps_and_reports(rank: int) -> None:
    worker = Worker(torch.device("cpu"), second=False, later=False)
    worker.rank = rank
    worker.vllm_config.parallel_config = SimpleNamespace(world_size=4, tensor_parallel_size=2)
    del worker._sums, worker._evidence
    worker.initialize_from_config(worker.model_runner.kv_cache_config)
    driver = Driver(worker)
    asked: list[int] = []
    compute = worker.model_runner.model.compute_logits
    worker.model_runner.model.compute_logits = lambda some: (asked.append(len(some)), compute(some))[1]
    wanted = StepPlan({"a": (BLOCKS["a"][:2], 6, 2)}, {"a": (1, [3, 14, 15, 9])}, fresh=[7, 2], evidence=True)
    output = driver.step({"a": 6}, wanted)
    assert asked == [1, 4]  # the second rank has its part in the logits
    assert hasattr(output, KEY) == hasattr(worker, "_sums") == (rank == 2)


def test_a_stage_before_the_last_keeps_nothing(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second runner leaves a state there too, without hidden states."""
    worker = Worker(torch.device("cpu"), second=second, later=False)
    worker.vllm_config.parallel_config = SimpleNamespace(world_size=2, tensor_parallel_size=1)
    worker.initialize_from_config(worker.model_runner.kv_cache_config)
    state = SimpleNamespace(hidden_states=None, slot_mappings=None, slot_mappings_by_layer=None)
    monkeypatch.setattr(
        Steps, "execute_model", lambda self, _: setattr(self.model_runner, "execute_model_state", state)
    )
    monkeypatch.setattr(Steps, "sample_tokens", lambda *_: None)
    given = StepPlan({"a": (BLOCKS["a"][:2], 6, 2)}, {"a": (1, [3, 14])}, fresh=[7], evidence=True)
    step = SimpleNamespace(
        total_num_scheduled_tokens=6, finished_req_ids={"b"}, preempted_req_ids=None, **{KEY: given}
    )
    worker.execute_model(step)
    assert worker._step is None
    assert worker.sample_tokens(None) is None


@pytest.mark.parametrize("why", ["finished_req_ids", "preempted_req_ids"])
def test_blocks_change_hands_while_steps_wait(device: torch.device, second: bool, why: str) -> None:
    driver = Driver(Worker(device, second=second, later=False))
    driver.step({"a": 6}, StepPlan(evidence=True))
    driver.step({"heir": 3}, StepPlan(evidence=True), **{why: {"a"}})
    driver.step({"heir": 1}, StepPlan(evidence=True))
    due = StepPlan(reports={"heir": (BLOCKS["heir"], 5, 3)}, evidence=True)
    positions, whole, mean, _, kept = getattr(driver.step({"heir": 1}, due), KEY)["heir"]
    assert whole
    assert torch.allclose(_floats(mean), torch.stack(driver.states["heir"]).sum(0) / positions, atol=1e-6)
    assert of_answer(_floats(kept).view(-1, 3), driver.drawn["heir"][:2]) is not None


def test_a_new_block_is_cleared_before_what_waits_is_entered(device: torch.device, second: bool) -> None:
    """Blocks are given as the sequence grows; what an earlier owner left in them counts for nothing."""
    driver = Driver(Worker(device, second=second, later=False))
    driver.step({"heir": 5}, StepPlan(evidence=True, fresh=BLOCKS["heir"]))
    driver.step({"a": 3}, StepPlan(evidence=True, fresh=BLOCKS["a"][:1]), finished_req_ids={"heir"})
    for count, fresh in ((2, BLOCKS["a"][1:2]), (1, []), (1, []), (1, []), (1, BLOCKS["a"][2:3])):
        driver.step({"a": count}, StepPlan(evidence=True, fresh=fresh))
    due = StepPlan(reports={"a": (BLOCKS["a"][:3], 10, 5)}, evidence=True)
    _, whole, mean, _, kept = getattr(driver.step({"a": 1}, due), KEY)["a"]
    assert whole
    assert torch.allclose(_floats(mean), torch.stack(driver.states["a"]).mean(0), atol=1e-6)
    assert of_answer(_floats(kept).view(-1, 3), driver.drawn["a"][1:6]) is not None


def test_a_block_filled_elsewhere_is_not_counted(device: torch.device, second: bool) -> None:
    """The heir's first two tokens come from a connector: its block holds what was kept for the first owner's."""
    due = StepPlan(reports={"heir": (BLOCKS["heir"][:1], 4, 2)}, evidence=True)
    for fresh, counted in (
        ([], True),
        ([BLOCKS["heir"][0]], False),
    ):  # without the list, it would be believed
        driver = Driver(Worker(device, second=second, later=False))
        driver.step({"a": 6}, StepPlan(evidence=True))  # two of them in its second block, the heir's first
        driver.states["heir"] += [torch.zeros(HIDDEN)] * 2
        driver.step({"heir": 1}, StepPlan(evidence=True, fresh=fresh), finished_req_ids={"a"})
        _, whole, _, _, kept = getattr(driver.step({"heir": 1}, due), KEY)["heir"]
        assert whole == counted
        first = _floats(kept).view(-1, 3)[0, 0]
        assert (first == -1) != counted  # evidence of the first owner's token


def test_a_response_is_measured_in_pieces(
    device: torch.device, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = [3, 14, 15, 9, 26]
    records = []
    for rows in (2, 128):
        monkeypatch.setattr(vllm_capture, "SCORED_ROWS", rows)
        driver = Driver(Worker(device, second=second, later=False))
        asked: list[int] = []
        compute = driver.worker.model_runner.model.compute_logits
        driver.worker.model_runner.model.compute_logits = lambda states: (
            asked.append(len(states)),  # noqa: B023
            compute(states),  # noqa: B023
        )[1]
        wanted = StepPlan({"a": (BLOCKS["a"][:2], 7, 2)}, {"a": (1, response)}, evidence=True)
        records.append(getattr(driver.step({"a": 7}, wanted), KEY)["a"])
        assert max(asked) == min(rows, 5)
    assert torch.allclose(_floats(records[0][4]), _floats(records[1][4]), rtol=1e-5)


def test_layers_of_several_sizes_under_one_table(device: torch.device, second: bool) -> None:
    worker = Worker(device, second=second, later=False)
    config = worker.model_runner.kv_cache_config
    together = UniformTypeKVCacheSpecs(block_size=SIZE, kv_cache_specs={"layer": spec(1), "other": spec(2)})
    config.kv_cache_groups = [SimpleNamespace(kv_cache_spec=together, layer_names=["layer", "other"])]
    worker.initialize_from_config(config)
    driver = Driver(worker)
    due = StepPlan(reports={"a": (BLOCKS["a"][:1], 4, 2)}, evidence=True)
    assert getattr(driver.step({"a": 4}, due), KEY)["a"][:2] == (4, True)


def test_what_is_kept_beside_the_cache_has_its_share_of_the_memory() -> None:
    worker = Worker(torch.device("cpu"), second=True, later=False)
    worker.vllm_config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    worker.vllm_config.model_config.hf_config = worker.vllm_config.model_config.hf_text_config = None
    worker.vllm_config.speculative_config = worker.vllm_config.kv_transfer_config = None
    block = 2 * spec(1).page_size_bytes
    blocks = worker.determine_available_memory() // block
    kept = 4 * (HIDDEN + 1) + 4 * 3 * SIZE  # a sum and a count; token, surprisal and margin of each slot
    assert blocks * (block + kept) <= 1 << 20 < (blocks + 1) * (block + kept)
    worker.vllm_config.cache_config.kv_cache_memory_bytes = 1 << 20  # the cache's, as whoever starts it says
    assert worker.determine_available_memory() == 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device is here")
def test_memory_on_the_gpu_does_not_grow_with_the_sequence() -> None:
    driver = Driver(Worker(torch.device("cuda"), second=True, later=True))
    due = StepPlan(reports={"a": (BLOCKS["a"][:1], 4, 2)}, evidence=True)  # nothing waits after it
    driver.step({"a": 4}, due)
    before = torch.cuda.memory_allocated()
    for _ in range(12):
        driver.step({"a": 1}, StepPlan(evidence=True))
    driver.worker._enter()
    assert torch.cuda.memory_allocated() == before


def _floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
