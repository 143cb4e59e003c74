"""Turns records into labelled answers with their h, by the engine, policy and chat format that will serve.

A layer is valid only for answers made as those it was calibrated on, so this asks the engine by the same policy as
the server does (`candor.policy`). Where the policy resamples, all attempts are made, since the region decides which
one is served (`calibration.served`). Given responses are summarised instead of generated. Answers that the server
could never admit are marked by their fault and not fitted on; held-out figures count them as not answered.

Each answer is labelled as soon as it is there (`calibration.labels`), so a verifier that fails does so on the first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from candor.calibration.cache import AnswerCache, CachedAnswer, cache_key
from candor.calibration.data import Label, Record
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.kept import KeptAnswers, NotKept
from candor.calibration.labels import label, verifier_of
from candor.calibration.verifiers import Verdict
from candor.engine.base import (
    Engine,
    Generation,
    HiddenSummary,
    PromptStates,
    PromptTooLong,
    Representation,
    Sampling,
)
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Turn, shown
from candor.policy.policy import Policy

Fault = Literal["truncated", "incomplete", "non_finite", "uncalibrated"]
"""Why the server would never admit an answer, in this order: it did not end on its own; not every position was
counted; h is not finite; its conversation or given response departs from the policy."""


@dataclass(frozen=True)
class Labelled:
    """One answer, its label and its h.

    prompt_digest: equal for the same prompt (`Record.prompt_digest`). messages: the record's conversation.
    label: 1 if the response follows the instruction, 0 if not.
    h: (D,) float32; (0,) where the states could not be captured. fault: None iff it can be scored.
    tokens: of the response. more: further attempts at the same prompt, in order, where the policy resamples.
    prompt_states: (P,) float32, at the end of prefill (`engine.base.PromptStates.vector`); (0,) where they are not
    known, and then no gate knows the prompt.
    unknown: nobody could say whether it is right; then the label is 0.
    """

    id: str
    prompt_digest: str
    messages: tuple[Turn, ...]
    response: str
    label: Label
    h: torch.Tensor
    fault: Fault | None = None
    tokens: int = 0
    more: tuple[Labelled, ...] = ()
    unknown: bool = False
    prompt_states: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def prompt(self) -> str:
        """The conversation as one text to show."""
        return shown(self.messages)

    @property
    def attempts(self) -> tuple[Labelled, ...]:
        """All attempts, this one first."""
        return (self, *self.more)


def scorable(answers: Sequence[Labelled]) -> list[Labelled]:
    return [answer for answer in answers if answer.fault is None]


def stacked_prompts(answers: Sequence[Labelled]) -> torch.Tensor:
    """(n, P) states of the answers' prompts; NaN where they are not known, P = 0 where none is."""
    unknown = torch.full((max(one.prompt_states.numel() for one in answers),), torch.nan)
    return torch.stack([one.prompt_states if one.prompt_states.numel() else unknown for one in answers])


def count_faults(answers: Sequence[Labelled]) -> dict[str, int]:
    return dict(Counter(answer.fault for answer in answers if answer.fault is not None))


Watch = Callable[[Record, CachedAnswer, Verdict], object]
"""Sees every answer with its verdict, None for unknown, as they come; what it raises ends the run."""


async def collect(
    engine: Engine,
    chat: ChatFormat,
    records: Sequence[Record],
    policy: Policy,
    representation: Representation,
    cache: AnswerCache,
    concurrency: int,
    progress: Callable[[int], object],
    seed: int = 0,
    watch: Watch = lambda *_: None,
    relabel: bool = False,
    prompt_states: bool = True,
) -> list[Labelled]:
    """Answers and labels every record, in order; answers in `cache` are not generated again.

    concurrency: answers in flight at once. progress: called with 1 for each answer labelled; each record has
    `policy.resample` answers. relabel: asks verifiers again whose verdicts are kept.
    prompt_states: whether the states at the end of prefill are wanted, as gates need them.
    seed: for sampled policies; every record draws its own stream from it.
    Raises DataError (a prompt that the model cannot take, one answer with two labels), VerifierError,
    CacheError, or the engine's own EngineDead and EngineError.
    """
    prompts = encode_prompts(engine.max_model_len, chat, records, policy)
    answers: dict[tuple[int, int], CachedAnswer] = {}
    verdicts: dict[tuple[int, int], Verdict] = {}
    every = list(product(range(len(records)), range(policy.resample)))
    if isinstance(engine, KeptAnswers):  # before anybody is asked for a label, which would be lost
        for index, attempt in every:
            drawn = _sampling(policy, records[index], seed, attempt)
            key = answer_key(engine, records[index], policy, representation, drawn)
            if not cache.holds(key, prompt_states=prompt_states):
                raise NotKept(f'the answer to "{records[index].id}" is not in the cache')
    todo = iter(every)

    async def work() -> None:
        for index, attempt in todo:  # workers share the iterator, so each item goes to one of them
            record = records[index]
            sampling = _sampling(policy, record, seed, attempt)
            key = answer_key(engine, record, policy, representation, sampling)
            answer = cache.get(key)
            if answer is None:
                answer = await _ask(
                    engine, chat, record, prompts[index], policy, representation, sampling, prompt_states
                )
                if answer.h.numel():  # an answer whose states were lost is tried again in the next run
                    cache.put(key, answer)
            elif prompt_states and not answer.prompt.numel():  # kept without them
                answer = replace(answer, prompt=prompt_vector(await engine.prompt_states(prompts[index])))
                cache.put(key, answer)
            answers[index, attempt] = answer
            # By itself, so that a slow judge does not hold up the next answer.
            workers.create_task(judge(index, attempt, answer))

    async def judge(index: int, attempt: int, answer: CachedAnswer) -> None:
        record = records[index]
        verdict = await label(record, answer.response, cache, relabel)
        verdicts[index, attempt] = verdict
        watch(record, answer, verdict)
        progress(1)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, len(records) * policy.resample)):
                workers.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    finally:
        await close_verifiers(records)
    labelled = []
    for index, record in enumerate(records):
        fault: Fault | None = "uncalibrated" if departure(record, policy, chat, representation.tag) else None
        first, *more = (
            _labelled(record, answers[index, attempt], verdicts[index, attempt], chat, fault)
            for attempt in range(policy.resample)
        )
        labelled.append(replace(first, more=tuple(more)))
    _refuse_contradictions(records, labelled)
    return labelled


async def close_verifiers(records: Sequence[Record]) -> None:
    """Ends the connections of these records' verifiers."""
    for verifier in {one for record in records if (one := verifier_of(record)) is not None}:
        if verifier.close is not None:
            await verifier.close()


def departure(record: Record, policy: Policy, chat: ChatFormat, tag: str) -> str | None:
    """Why the server would not call an answer to this record calibrated; None if it would for a complete answer."""
    found = policy.conversations.resolve(record.messages).departure
    if found is None and record.response is not None:
        found = policy.given(record.response, chat.encode_response(record.response), tag)
    return found


def require_calibrated(
    source: Path, records: Sequence[Record], policy: Policy, chat: ChatFormat, tag: str
) -> None:
    """Raises DataError that lists every record that the server would not call calibrated."""
    problems = [
        f'{record.place} (id "{record.id}"): {why}'
        for record in records
        if (why := departure(record, policy, chat, tag))
    ]
    if problems:
        raise DataError.from_problems(
            source,
            problems,
            "The server would never call such an answer calibrated. Correct or remove these records, or calibrate "
            "with another --system-prompt or --max-tokens.",
        )


def encode_prompts(
    max_model_len: int, chat: ChatFormat, records: Sequence[Record], policy: Policy
) -> list[list[int]]:
    """Encodes every prompt before the first is answered, so that a prompt too long is found now, not hours later.

    Raises DataError.
    """
    prompts, problems = [], []
    for record in records:
        try:
            ids = policy.conversations.resolve(record.messages).encode(chat)
        except ValueError as error:
            problems.append(f'{record.place} (id "{record.id}"): {error}')
            continue
        if record.response is not None and policy.resample > 1:
            problems.append(
                f'{record.place} (id "{record.id}"): its response is given, but this policy resamples'
            )
        answer = policy.max_tokens if record.response is None else len(chat.encode_response(record.response))
        if len(ids) + answer > max_model_len:
            problems.append(
                f'{record.place} (id "{record.id}"): {len(ids)} prompt tokens and {answer} for the '
                f"answer exceed the model's {max_model_len}"
            )
        prompts.append(ids)
    if problems:
        raise DataError.from_problems(
            "prompts",
            problems,
            "Shorten or remove these records, or raise --max-model-len; given responses go with --resample 1.",
        )
    return prompts


def _sampling(policy: Policy, record: Record, seed: int, attempt: int) -> Sampling:
    stream = f"{seed}:{record.id}" + (f":{attempt}" if attempt else "")
    drawn = int.from_bytes(sha256(stream.encode()).digest()[:4], "big")
    return policy.sampling(seed=drawn if policy.temperature > 0 else None)


def answer_key(
    engine: Engine, record: Record, policy: Policy, representation: Representation, sampling: Sampling
) -> str:
    """The key of a record's answer in the cache."""
    identity = {name: value for name, value in asdict(engine.identity).items() if name != "name"}
    if not identity["engine_options"]:
        del identity["engine_options"]  # keeps the keys of caches older than these options
    conversation = policy.conversations.resolve(record.messages)
    drawn = asdict(sampling)
    if sampling.grammar is None:
        del drawn["grammar"]  # likewise
    return cache_key(
        model=identity,  # with the digests of tokenizer and chat template
        **({"adapter": engine.adapter.sha256} if engine.adapter else {}),
        representation=representation.to_json(),
        messages=conversation.turns,
        **(
            {"template_arguments": conversation.template_arguments} if conversation.template_arguments else {}
        ),
        # A given response does not depend on the policy; attempts at one prompt differ by their seeds.
        **({"sampling": drawn} if record.response is None else {"response": record.response}),
    )


async def _ask(
    engine: Engine,
    chat: ChatFormat,
    record: Record,
    prompt_ids: list[int],
    policy: Policy,
    representation: Representation,
    sampling: Sampling,
    prompt_states: bool,
) -> CachedAnswer:
    try:
        if record.response is not None:
            summary = await engine.summarise(prompt_ids, chat.encode_response(record.response))
            prompt = prompt_vector(await engine.prompt_states(prompt_ids) if prompt_states else None)
            return CachedAnswer(record.response, False, vector(summary, representation), prompt)
        generation = None
        async for piece in engine.generate(prompt_ids, sampling, prompt_states=prompt_states):
            if isinstance(piece, Generation):
                generation = piece
    except PromptTooLong as error:
        raise DataError(
            f'{record.place} (id "{record.id}"): {error}; shorten or remove the record, '
            "or raise --max-model-len"
        ) from error
    if generation is None:
        raise CalibrationError(f'the engine ended without an answer for "{record.id}"; run again to resume')
    complete = policy.completed(generation.completion_tokens, ended=not generation.truncated)
    return CachedAnswer(
        generation.text,
        not complete,
        vector(generation.hidden, representation),
        prompt_vector(generation.prompt),
    )


def vector(summary: HiddenSummary | None, representation: Representation) -> torch.Tensor:
    """h (D,) float32; (0,) where it is not whole."""
    if summary is None or not summary.complete:
        return torch.empty(0)
    return summary.vector(representation).to(torch.float32)


def prompt_vector(states: PromptStates | None) -> torch.Tensor:
    """(P,) float32; (0,) where they are not whole."""
    return torch.empty(0) if states is None or not states.complete else states.vector().to(torch.float32)


def _labelled(
    record: Record, answer: CachedAnswer, verdict: Verdict, chat: ChatFormat, fault: Fault | None
) -> Labelled:
    return Labelled(
        record.id,
        record.prompt_digest,
        record.messages,
        answer.response,
        1 if verdict else 0,
        answer.h,
        fault or fault_of(answer),
        len(chat.encode_response(answer.response)),
        unknown=verdict is None,
        prompt_states=answer.prompt,
    )


def fault_of(answer: CachedAnswer) -> Fault | None:
    """Why an answer cannot be scored, as far as the answer itself tells."""
    if answer.truncated:
        return "truncated"
    if answer.h.numel() == 0:
        return "incomplete"
    return None if answer.h.isfinite().all() else "non_finite"


def _refuse_contradictions(records: Sequence[Record], labelled: Sequence[Labelled]) -> None:
    first: dict[tuple[str, str], tuple[Record, int]] = {}
    problems = []
    answers = [
        (record, one) for record, answer in zip(records, labelled, strict=True) for one in answer.attempts
    ]
    for record, answer in answers:
        if answer.unknown:
            continue
        other, before = first.setdefault((answer.prompt_digest, answer.response), (record, answer.label))
        if before != answer.label:
            problems.append(
                f"{other.unit}s {other.line} and {record.line}: same prompt, same answer, but "
                f"labels {before} and {answer.label}"
            )
    if problems:
        raise DataError.from_problems(
            "labels",
            problems,
            "Give these records one reference and verifier, or remove all but one of each.",
        )
