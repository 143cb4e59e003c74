"""A model's answers with their labels, for `finetune.probe` to learn from.

    a record with a verifier      `samples` answers of the model at temperature 1, each judged
    a record with its answer      that one, with its label

Of a prompt's answers that say the same, one is kept, with the number of times it was given. What nobody could judge
is left out, and an answer that the limit cut: it gets no verdict when it is served either.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from candor.calibration.answering import DataFile
from candor.calibration.data import Record
from candor.calibration.generate import close_verifiers
from candor.calibration.labels import label
from candor.engine.prompt import ChatFormat
from candor.finetune.documents import TAG
from candor.finetune.errors import FinetuneError
from candor.finetune.examples import Example

AT_ONCE = 128
"""Records between two writes of what was sampled and judged."""
FEWEST = 10
"""Right answers, and wrong ones, that regressions in five folds need."""


@dataclass(frozen=True)
class OwnAnswer:
    """id: its record's. label: whether it is right; None: nobody could say. times: given so often."""

    id: str
    response: str
    label: bool | None
    times: int


@dataclass(frozen=True)
class AnswerSet:
    """Different answers. documents: prompt, answer and tag; `learnt` is where the answer begins. right, times,
    prompt: of each; prompt: digests, equal for answers to one prompt."""

    documents: tuple[Example, ...]
    right: tuple[bool, ...]
    times: tuple[int, ...]
    prompt: tuple[str, ...]

    @classmethod
    def of(
        cls,
        answers: Sequence[OwnAnswer],
        file: DataFile,
        prompts: Sequence[Sequence[int]],
        chat: ChatFormat,
        max_tokens: int,
    ) -> AnswerSet:
        """prompts: token ids of the file's records. Raises FinetuneError for too few right or wrong ones."""
        closing, _ = chat.closing(TAG)
        number = {record.id: i for i, record in enumerate(file.records)}
        documents: dict[tuple[str, str, bool], Example] = {}
        times: Counter[tuple[str, str, bool]] = Counter()
        for answer in answers:
            record, before = file.records[number[answer.id]], prompts[number[answer.id]]
            response = chat.encode_response(answer.response)
            cut = record.response is None and len(response) >= max_tokens
            if answer.label is not None and not cut:
                same = (record.prompt_digest, answer.response, answer.label)
                times[same] += answer.times
                ids = (*before, *response, *closing)
                documents.setdefault(same, Example(ids, learnt=len(before), tag=len(ids) - 1))
        right = tuple(label_ for _, _, label_ in documents)
        if min(sum(right), len(right) - sum(right)) < FEWEST:
            raise FinetuneError(
                f"{file.path}: {sum(right)} of {len(right)} different answers are right; a verdict is learnt from at "
                f"least {FEWEST} right and {FEWEST} wrong ones: give more or other prompts, or more --samples"
            )
        return cls(
            tuple(documents.values()),
            right,
            tuple(times[same] for same in documents),
            tuple(digest for digest, _, _ in documents),
        )


def answered(
    accelerator: Any,
    records: Sequence[Record],
    prompts: Sequence[Sequence[int]],
    sample: Callable[[int, list[Sequence[int]]], list[list[str]]],
    path: Path,
) -> list[OwnAnswer]:
    """Answers of all records, kept in the file `path`: what is there is neither sampled nor judged again.

    sample: seed and prompts -> the texts of each prompt's answers, made by all processes. One of them judges.
    """
    found = _kept(path)
    done = next((i + 1 for i, record in enumerate(records) if found and record.id == found[-1].id), 0)
    if {one.id for one in found} - {record.id for record in records[:done]}:
        raise FinetuneError(
            f"{path} holds answers to other records: give the same data to resume, or another --out"
        )
    starts = tqdm(
        range(done, len(records), AT_ONCE),
        desc=f"answering {path.stem}",
        unit=f"{AT_ONCE} prompts",
        disable=not accelerator.is_main_process,
    )
    for start in starts:
        numbers = range(start, min(start + AT_ONCE, len(records)))
        asked = [i for i in numbers if records[i].response is None]
        texts = dict(zip(asked, sample(start, [prompts[i] for i in asked]), strict=True))
        if accelerator.is_main_process:
            given = {i: Counter(texts.get(i) or [records[i].response or ""]) for i in numbers}
            judged = asyncio.run(_judged(records, given))
            found += judged
            lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
            path.with_suffix(".unfinished").write_text(lines, encoding="utf-8")
            path.with_suffix(".unfinished").replace(path)
    accelerator.wait_for_everyone()
    return _kept(path)


def _kept(path: Path) -> list[OwnAnswer]:
    if not path.exists():
        return []
    return [OwnAnswer(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


async def _judged(records: Sequence[Record], given: Mapping[int, Counter[str]]) -> list[OwnAnswer]:
    flat = [(i, text, times) for i, texts in given.items() for text, times in texts.items()]
    try:
        said = await asyncio.gather(*(label(records[i], text, None) for i, text, _ in flat))
    finally:
        await close_verifiers([records[i] for i in given])
    return [
        OwnAnswer(records[i].id, text, verdict, times)
        for (i, text, times), verdict in zip(flat, said, strict=True)
    ]
