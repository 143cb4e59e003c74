"""SlotEvidence against log-probabilities taken one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from candor.engine.slot_evidence import SlotEvidence, of_answer, predecessors, surprisal_and_margin

BLOCKS = [3, 0]  # of four tokens each


def test_values_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    measured = surprisal_and_margin(logits, torch.tensor([1, 0]))
    assert measured[0].tolist() == pytest.approx([math.log(1 + math.exp(-1) + math.exp(-2)), 1.0])
    assert measured[1].tolist() == pytest.approx([math.log(2 + math.exp(5)), -5.0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_agree_with_log_softmax_and_are_left_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(11, 1000)).to(dtype)
    before, tokens = logits.clone(), logits.argmax(1)
    tokens[::3] = 7
    logprobs = logits.log_softmax(1, dtype=torch.float32)
    own = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    others = logprobs.scatter(1, tokens.unsqueeze(1), -torch.inf).amax(1)
    expected = torch.stack([-own, own - others], 1)
    assert torch.allclose(surprisal_and_margin(logits, tokens), expected, atol=1e-5)
    assert torch.equal(logits, before)


def test_a_sure_token_keeps_its_surprisal() -> None:
    logits = torch.tensor([[20.0, 0.0]])  # float32's 1 - 2e-9 is 1: log_softmax gives 0
    assert surprisal_and_margin(logits, torch.tensor([0]))[0, 0].item() == pytest.approx(
        math.exp(-20), rel=1e-3
    )


def _kept(tokens: list[int]) -> SlotEvidence:
    """A prompt of three tokens whose answer's were sampled one after the other."""
    kept = SlotEvidence(4, 4, torch.device("cpu"))
    slots = torch.tensor([12, 13, 14, 15, 0, 1])[: 2 + len(tokens)]
    kept.clear(slots)
    logits = torch.arange(10.0).repeat(len(tokens), 1)
    kept.write(slots[2:], torch.tensor(tokens), logits)
    return kept


def _read(kept: SlotEvidence, first: int, positions: int) -> torch.Tensor:
    return kept.read(torch.tensor(predecessors(BLOCKS, 4, first, positions)))


def test_an_answer_is_read_over_its_blocks() -> None:
    kept = _kept([9, 8, 2])
    found = of_answer(_read(kept, 3, 6), [9, 8])
    assert found is not None
    surprisals, margins = found
    assert margins == [1.0, -1.0]
    assert surprisals[1] - surprisals[0] == pytest.approx(1.0)


def test_other_tokens_are_not_taken_for_the_answers() -> None:
    kept = _kept([9, 8, 2])
    assert of_answer(_read(kept, 3, 6), [9, 7]) is None
    assert of_answer(_read(kept, 3, 5), [9, 8, 2]) is None


def test_a_reused_slot_forgets() -> None:
    kept = _kept([9, 8, 2])
    kept.clear(kept.places(torch.tensor([15, -1])))
    assert of_answer(_read(kept, 3, 6), [9]) == ([pytest.approx(0.4586, abs=1e-3)], [1.0])
    assert of_answer(_read(kept, 3, 6), [9, 8]) is None


def test_a_token_that_a_grammar_leaves_alone_has_finite_evidence() -> None:
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = torch.tensor([3.0, 3.0, torch.nan])
    logits[1, 4] = 1.0
    measured = surprisal_and_margin(logits, torch.tensor([2, 2, 2]))
    assert measured[0].tolist() == [0.0, 1000.0]
    assert measured[1].tolist() == pytest.approx([math.log1p(math.exp(-2)), 2.0])
    assert measured[2].isnan().any()  # what is broken stays so
