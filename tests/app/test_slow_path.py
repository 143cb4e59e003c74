"""What an answer costs beside its text, counted: a slow path shows here without a clock.

What it costs the engine is counted on vLLM itself (tests/engine/test_contract.py): one pass, one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from candor.app.answering.scoring import Scorer, ScoringRequest
from candor.engine.base import HiddenSummary
from candor.model_store.bundle import Bundle
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator


def fresh(estimator: SDMEstimator) -> SDMEstimator:
    """The same, with nothing made yet of what is made at first use."""
    return replace(estimator, support=replace(estimator.support))


def test_an_answer_is_one_request_to_the_engine(server: Any) -> None:
    before = server.engine.summarised
    assert server.chat("one").json()["reliability"]["results"][0]["region"] == "high"
    assert len(server.engine.asked) == 1
    server.chunks("streamed")
    assert len(server.engine.asked) == 2
    server.chat("three", n=3)
    assert len(server.engine.asked) == 5
    assert server.engine.summarised == before


def test_what_comparisons_need_is_made_before_the_first_answer_and_kept(
    estimator: SDMEstimator, bundle: Bundle, hidden: Callable[[Any], HiddenSummary]
) -> None:
    used = fresh(estimator)
    assert not _made(used)

    async def main() -> None:
        scorer = Scorer(replace(bundle, estimator=used), "lower", 5.0)
        await scorer.warm_up()
        made = _made(used)
        assert {"_projection", "sketch", "_norms"} <= made.keys()
        for _ in range(3):
            await scorer.judge(ScoringRequest(hidden("follows"), 0.9, calibrated=True, exemplars=2))
        assert _made(used) == made
        scorer.close()

    asyncio.run(main())


def _made(estimator: SDMEstimator) -> dict[str, int]:
    """What was made at first use, by name, and which object it is."""
    parts = {**vars(estimator), **vars(estimator.support)}
    fields = {*SDMEstimator.__dataclass_fields__, *type(estimator.support).__dataclass_fields__}
    return {name: id(part) for name, part in parts.items() if name not in fields}


class Largest(TorchDispatchMode):
    """The largest tensor that an operator gives while it is on, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for part in given if isinstance(given, tuple | list) else (given,):
            views = isinstance(part, torch.Tensor) and part._is_view()
            if isinstance(part, torch.Tensor) and not views:
                self.numel = max(self.numel, part.numel())
        return given


def test_scoring_copies_nothing_of_the_supports_size() -> None:
    torch.manual_seed(0)
    rows, width = 4000, 64
    labels = (torch.arange(rows) % 2).long()
    h = torch.randn(rows, width) + 2.0 * labels.unsqueeze(1)
    adaptor = ExemplarAdaptor(torch.zeros(width), torch.ones(width), width, 2)
    estimator = SDMEstimator.fit(adaptor, (h, labels), (h[:500] + 0.1, labels[:500]), (0.9,))
    estimator.judge(estimator.measure(h[:1] + 0.3), 0.9)
    with Largest() as largest, torch.inference_mode():
        estimator.judge(estimator.measure(h[5:6] + 0.3), 0.9)
    assert rows <= largest.numel < rows * width // 4  # the distances, but no copy of the exemplars
