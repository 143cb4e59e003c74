"""How fast calibration answers, beside vLLM's own offline `LLM.generate` with the same settings.

    python -m benchmarks.answering --model MODEL --data FILE [--verifier NAME] [--max-tokens N] [--eager]

Both engines live in one run and take turns on the same records, new ones each round, each on all cores. Here means
all that `candor calibrate` does for an answer: encoding, states of prompt and answer, label, cache. vLLM's is given
the tokens, and writes the answers alone. Prompts a second are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.servers import bind_all_cores
from candor.calibration.cache import AnswerCache
from candor.calibration.data import Record, load
from candor.calibration.generate import Labelled, collect, encode_prompts
from candor.calibration.kept import whole_answers
from candor.calibration.shapes import Reading
from candor.engine.base import EVIDENCE, Engine, Representation
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.policy.conversation import Conversations
from candor.policy.policy import Policy

KV_CACHE = 1 << 30
BLOCK = 32
HALF = 0.45
"""Of a GPU's memory: both engines share it."""
IN_FLIGHT = 64
REPRESENTATION = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)


async def here(
    engine: Engine, chat: ChatFormat, records: Sequence[Record], policy: Policy
) -> tuple[float, list[Labelled]]:
    """Returns seconds and answers."""
    with TemporaryDirectory() as folder, AnswerCache(Path(folder)) as cache:
        began = time.perf_counter()
        answers = await collect(
            engine, chat, records, policy, engine.representation, cache, IN_FLIGHT, lambda _: None
        )
        return time.perf_counter() - began, answers


def vllm_alone(llm: Any, prompts: Sequence[list[int]], policy: Policy, tag: str) -> tuple[float, list[str]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=policy.max_tokens, temperature=policy.temperature, stop=[tag])
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - began, [output.outputs[0].text for output in outputs]


async def measure(given: argparse.Namespace) -> list[tuple[float, float]]:
    """Returns prompts a second, here and by vLLM alone, of each round."""
    import candor.engine.vllm_engine  # noqa: F401  # sets what vLLM reads while it is imported  # isort: skip
    from vllm import LLM

    bind_all_cores()
    chat = ChatFormat.from_directory(given.model)
    records = load(given.data, Reading.parse(given.columns, given.verifier)).records
    asked = [record.messages for record in records]
    policy = Policy(max_tokens=given.max_tokens, conversations=Conversations.of_records(asked))
    settings = EngineSettings(
        given.model,
        representation=REPRESENTATION,
        eager=given.eager,
        kv_cache_bytes=KV_CACHE,
        block_size=BLOCK,
        vllm={"gpu_memory_utilization": HALF},
    )
    engine = await start_engine(whole_answers(settings), chat)
    llm = LLM(
        str(given.model),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_memory_bytes=KV_CACHE,
        block_size=BLOCK,
        gpu_memory_utilization=HALF,
        enforce_eager=given.eager,
        seed=0,
    )
    speeds = []
    try:
        for number in range(given.rounds + 1):  # the first warms up
            some = records[number * given.records : (number + 1) * given.records]
            if len(some) < given.records:
                break
            prompts = encode_prompts(settings.max_model_len, chat, some, policy)
            seconds = {}
            for way in sorted(("here", "vLLM"), reverse=bool(number % 2)):
                if way == "here":
                    seconds[way], answers = await here(engine, chat, some, policy)
                else:
                    seconds[way], texts = vllm_alone(llm, prompts, policy, REPRESENTATION.tag)
            same = sum(one.response == text.strip() for one, text in zip(answers, texts, strict=True))
            speeds.append((len(some) / seconds["here"], len(some) / seconds["vLLM"]))
            tokens = sum(one.tokens for one in answers) / len(some)
            print(
                f"{speeds[-1][0]:.1f} and {speeds[-1][1]:.1f} prompts/s, {tokens:.1f} tokens an answer, "
                f"{same} of {len(some)} answers the same",
                file=sys.stderr,
            )
    finally:
        await engine.close()
        llm.llm_engine.engine_core.shutdown()
    return speeds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", default="")
    parser.add_argument("--verifier")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--records", type=int, default=200, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="neither compiles")
    speeds = asyncio.run(measure(parser.parse_args()))
    ratios = sorted(ours / theirs for ours, theirs in speeds)
    print(
        f"prompts a second here {median(a for a, _ in speeds):.1f}, vLLM {median(b for _, b in speeds):.1f}"
    )
    print(f"ratio {median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}] of {len(ratios)} rounds")


if __name__ == "__main__":
    main()
