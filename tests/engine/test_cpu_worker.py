"""What the CPU worker mends in vLLM's CPU build."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM's CPU build alone", allow_module_level=True)

import candor.engine.vllm_cpu_worker  # noqa: F401  # mends it

from vllm.config import VllmConfig, set_current_vllm_config  # isort: skip
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # isort: skip
from vllm.v1.sample import rejection_sampler  # isort: skip

pytestmark = pytest.mark.model


@pytest.mark.parametrize("neox", [True, False])
def test_every_position_is_rotated_where_heads_have_an_axis_of_their_own(neox: bool) -> None:
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(64, 64, 128, 1e4, neox, torch.float32)
    positions = torch.arange(29)
    query, key = torch.randn(29, 4, 192)[..., 128:], torch.randn(29, 640)[:, None, 576:]
    flat = rotary.forward_cpu(positions, query.flatten(1), key.flatten(1).clone())
    heads = rotary.forward_cpu(positions, query, key)
    for have, want in zip(heads, flat, strict=True):
        assert torch.allclose(have.flatten(1), want, atol=1e-5)


def test_every_draft_token_has_its_requests_temperature() -> None:
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    heated = rejection_sampler.expand_batch_to_tokens(torch.tensor([0.0, 0.3, 0.9, 0.5]), ends, 6, 0, 1)
    assert torch.equal(heated, torch.tensor([1, 1, 0.9, 0.9, 0.9, 0.5]))
    ranks = rejection_sampler.expand_batch_to_tokens(torch.tensor([5, 7, -1, 0]), ends, 6)
    assert ranks.tolist() == [5, 5, -1, -1, -1, 0]
