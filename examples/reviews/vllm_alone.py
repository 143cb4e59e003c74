"""What vLLM's own offline `LLM.generate` takes for the same questions with the same settings, in seconds.

python -m examples.reviews.vllm_alone [--eager] MODEL MAX_TOKENS OUT.json FILE...
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from candor.calibration.data import load
from candor.calibration.generate import encode_prompts
from candor.calibration.shapes import Reading
from candor.engine.base import Representation
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.policy.policy import Policy
from examples.reviews.data import COLUMNS, VERIFIER


def main(model: Path, max_tokens: int, out: Path, files: list[Path], eager: bool) -> None:
    settings = EngineSettings(model, max_model_len=512, eager=eager)
    began = time.perf_counter()
    llm = started(settings)
    ready = time.perf_counter()
    answers = 0
    for file in files:  # one after the other, as calibration asks them
        records = load(file, Reading.parse(COLUMNS, VERIFIER)).records
        prompts = encode_prompts(
            settings.max_model_len, ChatFormat.from_directory(model), records, Policy(max_tokens=max_tokens)
        )
        answers += len(generate(llm, prompts, max_tokens))
    end = time.perf_counter()
    # A file, since vLLM's processes print to standard output whenever they like.
    out.write_text(json.dumps({"engine": ready - began, "answering": end - ready, "answers": answers}))


def started(settings: EngineSettings):
    """vLLM as `candor calibrate` starts it, without Candor's scheduler and worker."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    from vllm import LLM

    return LLM(
        str(settings.model),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_memory_bytes=1 << 30,
        block_size=32,
        enforce_eager=settings.eager,
        seed=0,
    )


def generate(llm, prompts: list[list[int]], max_tokens: int) -> list[str]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=[Representation().tag])
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("model", type=Path)
    parser.add_argument("max_tokens", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
