"""What an answer with its region costs without HTTP: beside vLLM as it is, and beside the seed papers' way.

    python -m benchmarks.capture

Three ways on the same prompts in alternation, new ones each round, each on all the cores there are:

    here         the engine with capture, then the estimator: as calibration and the server do it
    vLLM         as it is, with the same settings, answers alone, told to stop at the tag
    papers' way  transformers: `generate` for as many prompts at once as are in flight, one more forward pass of each
                 answer for h, then a flat index and q (`benchmarks.public_way`). In its favour: the public code
                 asks one prompt at a time, without a KV cache.

Beside vLLM, decoded tokens a second are compared, for Candor decodes one more an answer; beside the papers', answers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.public_way import FlatSupport
from benchmarks.servers import bind_all_cores
from benchmarks.serving import BLOCK, BUNDLE, KV_CACHE, LIMITS, MAX_TOKENS, MODEL, ROOT, Prompts, Workload
from candor.engine.base import Engine, Generation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.model_store.bundle import Bundle, load_bundle
from candor.sdm.adaptor import FrozenAdaptor

Way = Callable[[Sequence[Sequence[int]], int], Coroutine[Any, Any, int]]
"""Answers prompts with this many in flight; returns the number of decoded tokens."""


@dataclass(frozen=True)
class Here:
    engine: Engine
    bundle: Bundle

    async def __call__(self, prompts: Sequence[Sequence[int]], concurrency: int) -> int:
        return await _in_flight(self._answer, prompts, concurrency)

    async def _answer(self, prompt: Sequence[int]) -> int:
        *_, answer = [item async for item in self.engine.generate(prompt, Sampling(max_tokens=MAX_TOKENS))]
        assert isinstance(answer, Generation)
        if answer.hidden is None or not answer.hidden.complete:
            raise RuntimeError("an answer came without its state")
        manifest = self.bundle.manifest
        h = answer.hidden.vector(manifest.representation).unsqueeze(0)
        self.bundle.estimator.estimate(h, manifest.alphas[0])
        return answer.completion_tokens + answer.tagged  # the token after the tag is decoded too


@dataclass(frozen=True)
class AsItIs:
    llm: Any
    tag: str

    async def __call__(self, prompts: Sequence[Sequence[int]], concurrency: int) -> int:
        return await _in_flight(self._answer, prompts, concurrency)

    async def _answer(self, prompt: Sequence[int]) -> int:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            stop=[self.tag],
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        generated = self.llm.generate(tokens_input(list(prompt)), params, uuid.uuid4().hex)
        outputs = [output async for output in generated]
        return len(outputs[-1].outputs[0].token_ids)


class PapersWay:
    """Runs in its own process, started before vLLM binds this one to its cores."""

    def __init__(self, model: Path, bundle: Path) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_Transformers.load, initargs=(model, bundle)
        )

    async def __call__(self, prompts: Sequence[Sequence[int]], concurrency: int) -> int:
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._pool, _Transformers.answer, prompts, concurrency)

    def close(self) -> None:
        self._pool.shutdown()


class _Transformers:
    loaded: _Transformers

    @classmethod
    def load(cls, model: Path, bundle: Path) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        cls.loaded = cls(model, ChatFormat.from_directory(model), load_bundle(bundle))

    @classmethod
    def answer(cls, prompts: Sequence[Sequence[int]], concurrency: int) -> int:
        parts = [prompts[start : start + concurrency] for start in range(0, len(prompts), concurrency)]
        return sum(map(cls.loaded._answers, parts))

    def __init__(self, model: Path, chat: ChatFormat, bundle: Bundle) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._end = chat.end_id
        support = bundle.estimator.support
        self._index = FlatSupport.build(support.h_prime, support.labels, support.predictions)
        self._project = FrozenAdaptor(bundle.estimator.adaptor)
        self._width = bundle.estimator.adaptor.input_dim

    @torch.inference_mode()
    def _answers(self, prompts: Sequence[Sequence[int]]) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._end] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        generated = self._model.generate(
            ids,
            attention_mask=attention,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=self._end,
        )
        tokens = 0
        for prompt, answer in zip(prompts, generated[:, longest:].tolist(), strict=True):
            answer = answer[: answer.index(self._end) + 1] if self._end in answer else answer
            self._region([*prompt, *answer])
            tokens += len(answer)
        return tokens

    def _region(self, ids: Sequence[int]) -> None:
        states = self._model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].float()
        h = torch.cat([states.mean(0), states[-1]])[: self._width]
        padded = torch.nn.functional.pad(h, (0, self._width - len(h)))  # zeros for evidence features
        h_prime, _, y_hat, _ = self._project(padded.unsqueeze(0))
        self._index.compare(h_prime, y_hat)


async def _in_flight(
    answer: Callable[[Sequence[int]], Coroutine[Any, Any, int]],
    prompts: Sequence[Sequence[int]],
    concurrency: int,
) -> int:
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: Sequence[int]) -> int:
        async with gate:
            return await answer(prompt)

    return sum(await asyncio.gather(*map(one, prompts)))


async def measure(
    model: Path, bundle_path: Path, concurrencies: Sequence[int], rounds: int, eager: bool
) -> list[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    papers_way = PapersWay(model, bundle_path)
    await papers_way([], 1)
    bind_all_cores()
    chat, bundle = ChatFormat.from_directory(model), load_bundle(bundle_path)
    limits: dict[str, Any] = dict(LIMITS)
    representation = bundle.manifest.representation
    engine = await start_engine(
        EngineSettings(
            model=model,
            representation=representation,
            kv_cache_bytes=KV_CACHE,
            block_size=BLOCK,
            eager=eager,
            **limits,
        ),
        chat,
    )
    plain = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="bfloat16",
            kv_cache_memory_bytes=KV_CACHE,
            block_size=BLOCK,
            enforce_eager=eager,
            seed=0,
            **limits,
        )
    )
    ways: dict[str, Way] = {
        "here": Here(engine, bundle),
        "vLLM": AsItIs(plain, representation.tag),
        "papers": papers_way,
    }
    source = Prompts(ROOT / "demo/sentences.txt", seed=0)
    lines = []
    try:
        for concurrency in concurrencies:
            cell = Workload(concurrency, "short", shared=False)
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for number in range(rounds + 1):  # the first warms up
                prompts = [
                    chat.encode_chat([{"role": "user", "content": text}]) for text in source.draw(cell)
                ]
                for name in sorted(ways, reverse=bool(number % 2)):
                    began = time.perf_counter()
                    tokens = await ways[name](prompts, concurrency)
                    seconds = time.perf_counter() - began
                    if number:
                        speeds[name].append((tokens / seconds, len(prompts) / seconds))
            here, vllm, papers = (speeds[name] for name in ("here", "vLLM", "papers"))
            shown = [
                _spread([ours[0] / theirs[0] for ours, theirs in zip(here, vllm, strict=True)]),
                _spread([ours[1] / theirs[1] for ours, theirs in zip(here, papers, strict=True)]),
                _spread([one[1] for one in here]),
            ]
            lines.append(f"| {concurrency} | " + " | ".join(shown) + " |")
            print(lines[-1], file=sys.stderr)
    finally:
        papers_way.close()
        plain.shutdown()
        await engine.close()
    return lines


def _spread(figures: Sequence[float]) -> str:
    return f"{median(figures):.3g} [{min(figures):.3g}, {max(figures):.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, action="append", help="default: 1, 8 and 32")
    parser.add_argument("--eager", action="store_true", help="neither vLLM compiles")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    given = parser.parse_args()
    lines = asyncio.run(
        measure(given.model, given.bundle, given.concurrency or (1, 8, 32), given.rounds, given.eager)
    )
    print("| in flight | tokens/s, times vLLM's | answers/s, times the papers' way | answers/s |")
    print("|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
