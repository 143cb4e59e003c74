"""What is timed beside ours counts what ours counts: otherwise the ratio would compare different work."""

from __future__ import annotations

import pytest
import torch

from candor.sdm.similarity import neighbourhood, support_neighbourhood
from candor.sdm.support import Support

pytest.importorskip("faiss", reason="faiss-cpu is needed by benchmarks alone")


def test_the_public_way_finds_the_same_q_and_distance() -> None:
    from benchmarks.public_way import FlatSupport

    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(340, 8, generator=generator), torch.arange(340) % 2
    rows[:, 0] += 2 * labels
    predictions = torch.where(torch.rand(340, generator=generator) < 0.05, 1 - labels, labels)
    support = Support(rows[:300], labels[:300], predictions[:300])
    public = FlatSupport.build(support.h_prime, support.labels, support.predictions)
    q, nearest = public.compare(rows[300:], predictions[300:])
    ours = neighbourhood(rows[300:], predictions[300:], support)
    assert torch.equal(q, ours.q)
    assert torch.allclose(nearest, ours.d_nearest, atol=1e-4)
    assert q.max() > 5
    own_q, _ = public.compare(support.h_prime, support.predictions, own_rows=True)
    assert torch.equal(own_q, support_neighbourhood(support).q)
