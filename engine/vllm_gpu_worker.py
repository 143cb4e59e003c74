"""vLLM's GPU worker with capture, under either of its model runners: on CUDA vLLM 0.32 takes the second."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from candor.engine.vllm_capture import WorkerCapture


class CaptureGPUWorker(WorkerCapture, Worker):
    pass
