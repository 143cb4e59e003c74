"""vLLM's CPU worker with capture."""

from __future__ import annotations

import gc
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  - before the rest of vLLM

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.sample import rejection_sampler

from candor.engine.vllm_capture import WorkerCapture


class CaptureCPUWorker(WorkerCapture, CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            # vLLM makes this in its warm-up, which its CPU build leaves out where nothing is compiled.
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def shutdown(self) -> None:
        super().shutdown()
        # As vLLM does at its engine's end: else Python looks for cycles among all its objects, for seconds.
        gc.freeze()


def _keep_what_was_compiled() -> None:
    """vLLM 0.32 compiles anew at every start on a CPU: it loads what it compiled before, then calls a method that its
    own compiler's results have, but not inductor's, which the CPU build uses. So an empty method is added.
    """
    load: Any = torch.compiler.load_compiled_function

    def loaded(*args: Any, **kwargs: Any) -> Any:
        function = load(*args, **kwargs)
        compiled = function._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _: None
        return function

    torch.compiler.load_compiled_function = loaded


def _rotate_every_position() -> None:
    """vLLM 0.32's CPU kernel takes a query's heads for positions where they have an axis of their own (MLA with plain
    rotary embeddings, uncompiled), so that most positions are not rotated. Its PyTorch version is right.
    """
    rotate = RotaryEmbedding.forward_cpu

    def rotated(self: Any, positions: Any, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() == 3:
            return self.forward_native(positions, query, key)
        return rotate(self, positions, query, key)

    RotaryEmbedding.forward_cpu = rotated


def _heat_drafts_by_their_request() -> None:
    """vLLM 0.32's CPU kernel writes each draft token's temperature, top-k and top-p to a copy that is dropped, unless
    they are int64, so that what lay in memory stands for them: where one request of a step samples, the greedy ones'
    tokens are drawn too, and two ranks draw apart.
    """

    def expanded(
        x: torch.Tensor, ends: torch.Tensor, tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        """(requests,) to (tokens,); ends: (requests,), after each one's last."""
        counts = ends.diff(prepend=ends.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    rejection_sampler.expand_batch_to_tokens = expanded


_keep_what_was_compiled()
_rotate_every_position()
_heat_drafts_by_their_request()
