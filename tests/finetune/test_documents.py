"""Documents as the trainer sees them: what is learnt, where h is taken, which negatives are shown."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.engine.transformers_engine import TransformersEngine
from candor.finetune.batches import collate, shuffled_batches
from candor.finetune.data import Pair
from candor.finetune.examples import negative, positive
from candor.finetune.forward import LearntPositions
from candor.finetune.generation import generate
from candor.finetune.negatives import Negatives
from candor.finetune.passes import spread
from candor.finetune.settings import FinetuneSettings

TAG = "<verified>"


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.from_directory(tiny_model)


def test_learnt_are_the_answer_or_the_tag_alone(chat: ChatFormat) -> None:
    prompt = chat.encode_chat([{"role": "user", "content": "b a"}])
    right = positive(chat, prompt, "<sentence>a b</sentence>", TAG)
    wrong = negative(chat, prompt, "<sentence>b a</sentence>", TAG)
    assert chat.decode(right.ids[right.learnt :]) == "<sentence>a b</sentence>\n<verified>Yes</verified>"
    assert chat.decode(wrong.ids[wrong.learnt :]) == "<verified>No</verified>"
    for example in (right, wrong):
        assert example.ids[-1] == chat.end_id
        assert chat.decode(example.ids[: example.tag + 1]).endswith("\n<verified>")


def test_h_and_loss_of_one_pass_are_the_engines(chat: ChatFormat, tiny_model: Path) -> None:
    """What training calls h is what serving calls h, padding or not."""
    from transformers import AutoModelForCausalLM

    prompt = chat.encode_chat([{"role": "user", "content": "b a"}])
    texts = ["<sentence>a b</sentence>", "<sentence>a longer one, to be padded for</sentence>"]
    batch = collate([positive(chat, prompt, texts[0], TAG), negative(chat, prompt, texts[1], TAG)])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        logits, h = LearntPositions(model)(batch)
    engine = TransformersEngine(EngineSettings(model=tiny_model, kind="transformers", dtype="float32"), chat)
    for row, text in enumerate(texts):
        summary = asyncio.run(engine.summarise(prompt, chat.encode_response(text)))
        expected = torch.cat([summary.mean, summary.last])
        assert torch.allclose(h[row], expected, rtol=1e-4, atol=1e-5)
    asyncio.run(engine.close())
    assert logits is not None
    alone = positive(chat, prompt, texts[0], TAG)
    with torch.no_grad():
        everywhere = model(torch.tensor([alone.ids])).logits[0]
    first = logits[batch.document == 0]
    assert torch.allclose(first, everywhere[alone.learnt - 1 : -1], rtol=1e-4, atol=1e-4)
    assert batch.targets[batch.document == 0].tolist() == list(alone.ids[alone.learnt :])


def test_generated_answers_are_the_engines(chat: ChatFormat, tiny_model: Path) -> None:
    """Batched with other lengths, adapters and a compiled model or not: greedy is greedy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = [
        chat.encode_chat([{"role": "user", "content": text}])
        for text in ("b a", "a much longer prompt it is", "c")
    ]
    together = generate(model, chat, prompts, TAG, 8)
    assert together == [generate(model, chat, [prompt], TAG, 8)[0] for prompt in prompts]
    assert model.config._attn_implementation  # put back
    torch.manual_seed(0)
    sampled = generate(model, chat, prompts, TAG, 8, samples=3)
    assert [len(answers) for answers in sampled] == [3, 3, 3]
    assert len(set(sampled[0])) > 1


def test_every_document_is_in_one_batch_of_like_length() -> None:
    lengths = [random.Random(i).randint(5, 50) for i in range(103)]
    batches = shuffled_batches(lengths, 10, random.Random(1))
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) <= 45
    assert batches == shuffled_batches(lengths, 10, random.Random(1))
    assert batches != shuffled_batches(lengths, 10, random.Random(2))


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_processes_share_the_work_in_as_many_passes(count: int) -> None:
    shares = [list(spread(range(count), 2, rank, 3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    counted = [i for share in shares for numbers, counts in share if counts for i in numbers]
    assert sorted(counted) == list(range(count))


class TestNegatives:
    def made(self, pairs: list[Pair], **changes: float) -> Negatives:
        return Negatives(pairs, replace(FinetuneSettings(), **changes), "train")  # type: ignore[arg-type]

    def test_shares_follow_the_gammas(self, pairs: list[Pair]) -> None:
        many = pairs * 50
        negatives = self.made(many, gamma_plus=0.25, gamma_gen=0.5)
        numbers = range(len(many))
        shown = sum(negatives.is_positive("step", 1, i) for i in numbers) / len(many)
        assert shown == pytest.approx(0.25, abs=0.03)
        asked = negatives.to_generate("step", 1, numbers)
        assert len(asked) / len(many) == pytest.approx(0.75 * 0.5, abs=0.03)
        assert not any(negatives.is_positive("step", 1, i) for i in asked)
        assert negatives.to_generate("step", 0, numbers) == []
        assert self.made(many, generate_from=0, gamma_gen=1.0, gamma_plus=0.0, loss="ce").to_generate(
            "step", 0, numbers
        ) == list(numbers)
        assert self.made(many, hard_negatives=False).to_generate("step", 1, numbers) == []

    def test_only_wrong_answers_are_kept_and_for_one_epoch_more(self, pairs: list[Pair]) -> None:
        negatives = self.made(pairs, gamma_diversity=1.0)
        assert negatives.pick("step", 0, 0) == pairs[0].negative
        assert negatives.offer([0, 1], ["wrong", pairs[1].positive]) == 1
        assert negatives.pick("step", 1, 0) == "wrong"
        assert negatives.pick("step", 1, 1) == pairs[1].negative
        negatives.begin_epoch()
        assert negatives.pick("step", 2, 0) == "wrong"
        negatives.begin_epoch()
        assert negatives.pick("step", 3, 0) == pairs[0].negative

    def test_without_diversity_the_static_one_stays(self, pairs: list[Pair]) -> None:
        negatives = self.made(pairs, gamma_diversity=0.0)
        negatives.offer([0], ["wrong"])
        assert negatives.pick("step", 1, 0) == pairs[0].negative


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"gamma_gen": 1.1},
        {"learning_rate": 0.0},
        {"checkpoint_every": 5},
        {"lora_rank": -1},
        {"generate_from": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(FinetuneSettings(), **change)  # type: ignore[arg-type]
