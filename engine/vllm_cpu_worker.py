"""vLLM's CPU worker with capture."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  - before the rest of vLLM

from candor.engine.vllm_capture import WorkerCapture


class CaptureCPUWorker(WorkerCapture, CPUWorker):
    pass
