"""vLLM's GPU worker with capture, under vLLM's first model runner."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from candor.engine.vllm_capture import CaptureMixin


class CaptureGPUWorker(CaptureMixin, Worker):
    pass
