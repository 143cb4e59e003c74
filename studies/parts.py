"""CPU time of what Candor adds to an answer, part by part, without a model.

    python -m studies.parts

    evidence   of one decode step, from its logits; beside the first two steps of vLLM's own log-probabilities
    score      of answers that end together, with the demo's bundle and with 20,000 exemplars
    HTTP       request in, stream out, through the real server, with an engine that has its words ready;
               the score is part of what an answer costs there, not of what a chunk costs

The least of several rounds, of the thread or process that does it: what others do with the machine's cores
lengthens the clock's time, not this one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import uvicorn

from benchmarks.scoring import WIDTH, draw
from benchmarks.serving import BUNDLE, MODEL
from candor.app.answering.scoring import Scorer, ScoringRequest
from candor.app.process.application import create_app
from candor.app.process.backend import Backend
from candor.app.process.settings import Settings
from candor.engine.answer import AnswerText
from candor.engine.base import (
    AdapterIdentity,
    Delta,
    Generation,
    HiddenSummary,
    PromptReading,
    PromptStates,
    Sampling,
)
from candor.engine.prompt import ChatFormat
from candor.engine.slot_evidence import surprisal_and_margin
from candor.model_store.bundle import Bundle, load_bundle
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.support import Support

VOCABULARY = 49_152
QUESTION = (
    "Finish the sentence with the words in the right order.\nSentence: The dog ran to\nWords: house. the"
)
STREAMS, EACH = 8, 10

CLIENT = """
import asyncio, sys
port, body, each, streams = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"content-length: {len(body)}"]
head = "\\r\\n".join([*lines, "content-type: application/json", "", ""]).encode()
async def stream():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(each):
        writer.write(head + body)
        end = b""
        while not end.endswith(b"0\\r\\n\\r\\n"):
            data = await reader.read(65536)
            assert data, "the server hung up"
            end = (end + data)[-8:]
    writer.close()
async def main():
    await asyncio.gather(*(stream() for _ in range(streams)))
asyncio.run(main())
"""


def least_ms(
    work: Callable[[], object], clock: Callable[[], float] = time.thread_time, rounds: int = 20
) -> float:
    found = []
    for _ in range(rounds):
        began = clock()
        work()
        found.append(clock() - began)
    return 1000 * min(found)


def evidence() -> Iterator[str]:
    torch.manual_seed(0)
    for rows in (1, 8, 32):
        logits = (3 * torch.randn(rows, VOCABULARY)).to(torch.bfloat16)
        tokens = logits.argmax(1)
        ours = least_ms(lambda: surprisal_and_margin(logits, tokens))  # noqa: B023
        theirs = least_ms(lambda: logits.log_softmax(-1, dtype=torch.float32).topk(2))  # noqa: B023
        yield f"| evidence of a step, {rows} answers | {ours:.2f} | log-softmax and 2 alternatives: {theirs:.2f} |"


def scores(bundle: Bundle) -> Iterator[str]:
    torch.manual_seed(0)
    hidden = [summary(bundle) for _ in range(32)]
    yield from scores_with(bundle.estimator, bundle, hidden)


def scores_at_size(bundle: Bundle, size: int = 20_000) -> Iterator[str]:
    """With so many exemplars of 1,000 numbers, drawn as in `benchmarks.scoring`; the adaptor changes nothing."""
    h_prime, labels, predictions = draw(size + 32, torch.Generator().manual_seed(0))
    width = bundle.estimator.adaptor.input_dim
    adaptor = ExemplarAdaptor(torch.zeros(width), torch.ones(width), WIDTH, 2)
    torch.nn.init.eye_(adaptor.exemplar.weight)
    torch.nn.init.zeros_(adaptor.exemplar.bias)
    support = Support(h_prime[:size], labels[:size], predictions[:size])
    representation = bundle.manifest.representation
    sizes = representation.block_sizes(bundle.manifest.model.hidden_size)
    hidden = []
    for h in torch.nn.functional.pad(h_prime[size:], (0, width - WIDTH)):
        parts = dict(zip(representation.order, h.split(sizes), strict=True))
        nothing = torch.zeros(0)
        hidden.append(
            HiddenSummary(
                parts.get("mean", nothing), parts["last"], parts.get("evidence", nothing), 80, complete=True
            )
        )
    yield from scores_with(replace(bundle.estimator, adaptor=adaptor, support=support), bundle, hidden)


def scores_with(estimator: SDMEstimator, bundle: Bundle, hidden: Sequence[HiddenSummary]) -> Iterator[str]:
    scorer = Scorer(replace(bundle, estimator=estimator), "lower", 10.0)
    for rows in (1, 8, 32):
        work = partial(score_all, scorer, hidden[:rows])
        work()
        spent = least_ms(work, time.process_time)
        support = f"{len(estimator.support):,} exemplars of {estimator.support.h_prime.shape[1]:,}"
        yield f"| score of {rows} answers at once, {support} | {spent:.2f} | {spent / rows:.2f} each |"
    scorer.close()


def score_all(scorer: Scorer, hidden: Sequence[HiddenSummary]) -> None:
    asyncio.run(together(scorer, hidden))


async def together(scorer: Scorer, hidden: Sequence[HiddenSummary]) -> None:
    await asyncio.gather(*(scorer.judge(ScoringRequest(one, 0.9, calibrated=True)) for one in hidden))


def summary(bundle: Bundle) -> HiddenSummary:
    size = bundle.manifest.model.hidden_size
    names = len(bundle.manifest.representation.evidence)
    return HiddenSummary(torch.randn(size), torch.randn(size), torch.randn(names), 80, complete=True)


class Ready:
    """An engine that says so many words, a token each, as fast as they are taken."""

    max_model_len = 2048
    adapter: AdapterIdentity | None = None

    def __init__(self, bundle: Bundle, words: int) -> None:
        self.identity = self.earlier_identity = bundle.manifest.model
        self.representation = bundle.manifest.representation
        self._words = words
        self._hidden = summary(bundle)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        if prompt_states:
            yield await self.prompt_states(prompt_ids)
        answer = AnswerText(self.representation.tag, [1])
        for piece in [*[" word"] * self._words, self.representation.tag]:
            await asyncio.sleep(0)
            if delta := answer.add(piece, (5,)):
                yield delta
        ids = tuple(answer.token_ids[:-1])
        yield Generation(
            answer.text, ids, "stop", True, False, self._hidden, len(prompt_ids), self._words + 1
        )

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        return self._hidden

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        return PromptStates(self._hidden.mean, self._hidden.last, complete=True)

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        return PromptReading(await self.prompt_states(prompt_ids), (-1.0,) * len(token_ids))

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


@contextmanager
def listening(bundle: Bundle, chat: ChatFormat, words: int) -> Iterator[int]:
    """The port of a server with that engine."""
    app = create_app(Settings(model=MODEL, bundle=BUNDLE), Backend(Ready(bundle, words), chat, bundle))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def http(bundle: Bundle) -> Iterator[str]:
    chat = ChatFormat.from_directory(MODEL)
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": bundle.manifest.name, "messages": messages, "stream": True})
    spent: dict[int, float] = {}
    for words in (1, 61):
        with listening(bundle, chat, words) as port:
            command = [sys.executable, "-c", CLIENT, str(port), body, str(EACH), str(STREAMS)]
            work = partial(subprocess.run, command, check=True)
            work()
            spent[words] = least_ms(work, time.process_time, rounds=5) / (EACH * STREAMS)
    yield f"| HTTP, an answer of one chunk, its score included | {spent[1]:.2f} | |"
    yield f"| HTTP, each further chunk | {(spent[61] - spent[1]) / 60:.4f} | |"


def main() -> None:
    torch.set_num_threads(1)
    bundle = load_bundle(BUNDLE)
    print("| part | ms of CPU | |\n|---|---|---|")
    for part in (evidence(), scores(bundle), scores_at_size(bundle), http(bundle)):
        for line in part:
            print(line, flush=True)


if __name__ == "__main__":
    main()
