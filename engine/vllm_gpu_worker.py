"""vLLM's GPU worker with capture, for either of its model runners; vLLM 0.32 uses the second on CUDA."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from candor.engine.vllm_capture import WorkerCapture


class CaptureGPUWorker(WorkerCapture, Worker):
    pass
