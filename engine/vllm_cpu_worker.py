"""vLLM's CPU worker with capture."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  - before the rest of vLLM

import torch

from candor.engine.vllm_capture import WorkerCapture


class CaptureCPUWorker(WorkerCapture, CPUWorker):
    pass


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


_keep_what_was_compiled()
