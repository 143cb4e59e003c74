"""Golden prompts: they check that this engine gives the hidden states that were calibrated.

    a prompt of the support -> engine -> h -> h',     |h' - h'_stored| <= TOLERANCE * median_j |h'_j - h'_stored|
                                                      y_hat = y_hat_stored

For each row of the support, the bundle holds the prompt, the answer, h' and the prediction, as calibration saw
them. So the check compares this machine with the one that calibrated; a state stored at the first start could
only show that nothing changed since then. The check uses one row per class: the correctly predicted row with the
largest margin. There, only a state that is truly different changes the verdict.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from candor.engine.base import EngineError, Generation, HiddenSummary
from candor.model_store.formats import knows_turns
from candor.policy.decisions import Decided, Posed, Prompt, asked_before

if TYPE_CHECKING:
    from candor.app.process.backend import Backend

logger = logging.getLogger("candor")

TOLERANCE = 0.25
"""Maximum error, as a share of the median distance to the rows; docs/api.md gives the measured errors."""


class GoldenMismatch(EngineError):
    """The engine's states are not those that were calibrated, so no verdict means anything."""


@dataclass(frozen=True)
class _Case:
    """asked: of a decision, whose response says its labels; None: an answer."""

    row: int
    prompt_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]
    asked: Posed | None = None


class SelfTest:
    """The golden prompts of a bundle. fault: the mismatch that the last check found, None if it found none."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._cases = _choose(backend)
        self._one_at_a_time = asyncio.Lock()
        self.fault: GoldenMismatch | None = None
        if not self._cases:
            logger.warning(
                "no golden prompt: the bundle has no exemplar that fits the context and whose turns are known"
            )

    async def check(self) -> None:
        """Runs all golden prompts. Raises GoldenMismatch, or the engine's own error."""
        async with self._one_at_a_time:
            try:
                for case in self._cases:
                    hidden = await self._answer(case)
                    await asyncio.to_thread(self._compare, case, hidden)  # it looks at the whole support
            except GoldenMismatch as mismatch:
                self.fault = mismatch
                raise
            self.fault = None

    async def _answer(self, case: _Case) -> HiddenSummary:
        """Returns the stored answer's state: from generation if it gives this very answer, else from a new pass."""
        engine = self._backend.engine
        if case.asked is not None:
            prompt = Prompt(case.asked, case.prompt_ids, None)
            reading = await engine.read_prompt(case.prompt_ids, case.asked.label_ids)
            return Decided.of(prompt, reading).summary(engine.representation)
        sampling = self._backend.bundle.manifest.policy.sampling(temperature=0.0)
        generation: Generation | None = None
        async with aclosing(engine.generate(case.prompt_ids, sampling)) as outputs:
            async for output in outputs:
                if isinstance(output, Generation):
                    generation = output
        if generation is None:
            raise EngineError("the engine ended without an answer")
        if generation.text == case.response and generation.hidden is not None:
            return generation.hidden
        return await engine.summarise(case.prompt_ids, case.response_ids)

    def _compare(self, case: _Case, hidden: HiddenSummary) -> None:
        bundle = self._backend.bundle
        support, row = bundle.estimator.support, case.row
        with torch.inference_mode():
            h = hidden.vector(bundle.manifest.representation).unsqueeze(0)  # (1, D)
            seen = bundle.estimator.measure(h)
            stored = support.h_prime[row]  # (M,)
            unit = (support.h_prime - stored).norm(dim=1).median()
            error = float((seen.h_prime[0] - stored).norm() / unit)
        known, found = int(support.predictions[row]), int(seen.y_hat[0])
        exemplar = bundle.exemplars[row].id
        logger.info("golden prompt exemplar=%s difference=%.3f verdict=%d", exemplar, error, found)
        if not (hidden.complete and bool(seen.finite[0]) and error <= TOLERANCE and found == known):
            raise GoldenMismatch(
                f"the engine does not give the states that were calibrated: on the golden prompt {exemplar} expected "
                f"verdict {known} and a difference of at most {TOLERANCE}, got {found} and {error:.3f} (complete: "
                f"{hidden.complete}, finite: {bool(seen.finite[0])}). Look at driver, library and quantisation, or "
                "calibrate on this machine."
            )


def _choose(backend: Backend) -> tuple[_Case, ...]:
    bundle, chat = backend.bundle, backend.chat
    support = bundle.estimator.support
    with torch.inference_mode():
        z_prime = bundle.estimator.adaptor.head(support.h_prime)  # (N, C)
        best, second = z_prime.topk(2, dim=1).values.unbind(1)
    margin = (best - second).where(support.labels == support.predictions, -1.0)
    conversations = bundle.manifest.policy.conversations
    cases: list[_Case] = []
    for known in range(z_prime.shape[1]):
        of_class = margin.where(support.predictions == known, -1.0)
        for row in of_class.argsort(descending=True, stable=True)[:_TRIED].tolist():
            exemplar = bundle.exemplars[row]
            known_turns = knows_turns(bundle.manifest.format_version) or len(exemplar.messages) == 1
            if of_class[row] < 0 or not known_turns:
                continue
            prompt_ids = conversations.resolve(exemplar.messages).encode(chat)
            if conversations.decides:
                asked = asked_before(exemplar.messages[-1], exemplar.response, chat)
                cases.append(_Case(row, (*prompt_ids, *asked.given), exemplar.response, (), asked))
                break
            response_ids = chat.encode_response(exemplar.response)
            if len(prompt_ids) + len(response_ids) + _TAG_ROOM <= backend.engine.max_model_len:
                cases.append(_Case(row, tuple(prompt_ids), exemplar.response, tuple(response_ids)))
                break
    return tuple(cases)


_TRIED = 100  # rows per class, largest margin first
_TAG_ROOM = 32  # tokens of the tag and its separator, which the engine appends
