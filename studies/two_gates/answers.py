"""Answers and states of many prompts, in batches, kept in a file so that a run that was stopped goes on.

Of every prompt: greedy answer, label, h as `engine.base` defines it, and what is known at the end of prefill,

    prompt = [ mean over the prompt's positions of the final normed states ; the same at its last position ]

Greedy answers come batch by batch with padding on the left; states in a second pass over the whole sequences, padded
on the right, where no position sees the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from candor.calibration.data import Record
from candor.calibration.generate import Labelled
from candor.calibration.verifiers import load_verifier
from candor.engine.answer import AnswerText
from candor.engine.base import EVIDENCE
from candor.engine.evidence import features
from candor.engine.prompt import ChatFormat
from candor.engine.slot_evidence import surprisal_and_margin

TAG = "<verified>"
BATCH = 32


@dataclass(frozen=True)
class Answered:
    """n records. prompts: (n, 2 H), h: (n, 2 H + 6), both float32; labels (n,) int64; complete (n,) bool: the answer
    ended on its own. digests: of the prompts; texts: the answers."""

    prompts: Tensor
    h: Tensor
    labels: Tensor
    complete: Tensor
    digests: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Answered:
        at = torch.tensor(list(rows), dtype=torch.int64)
        return Answered(
            self.prompts[at],
            self.h[at],
            self.labels[at],
            self.complete[at],
            tuple(self.digests[i] for i in rows),
            tuple(self.texts[i] for i in rows),
        )

    def labelled(self) -> list[Labelled]:
        """As `calibration.fit` takes them; those that did not end on their own are marked."""
        return [
            Labelled(
                str(i),
                self.digests[i],
                (),
                self.texts[i],
                1 if self.labels[i] else 0,
                self.h[i],
                None if self.complete[i] else "truncated",
            )
            for i in range(len(self))
        ]


class BatchedModel:
    """A causal model on the CPU in bfloat16, and its chat format."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.chat = ChatFormat.from_directory(directory)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self._closing, self._tag = self.chat.closing(TAG)

    @torch.inference_mode()
    def answer(self, records: Sequence[Record], max_tokens: int) -> list[dict[str, Any]]:
        """One dict a record: text, label, complete, h, prompt, digest."""
        prompts = [self.chat.encode_chat(record.messages) for record in records]
        generated = self._generate(prompts, max_tokens)
        answers = []
        for ids in generated:
            answer = AnswerText(TAG, self._tag)
            before = ""
            for token in ids:
                if token == self.chat.end_id:
                    answer.add("", [token])
                    continue
                text = self.chat.decode([t for t in (*answer.token_ids, token) if t != self.chat.end_id])
                text = text.rstrip("\ufffd")
                answer.add(text[len(before) :], [token])
                before = text
            answer.finish(answer.length(self.chat.is_blank), stopped=False)
            answers.append(answer)
        lengths = [answer.length(self.chat.is_blank) for answer in answers]
        bodies, rest = [], []
        for answer, length in zip(answers, lengths, strict=True):
            body = answer.token_ids[:length] if length is not None else self.chat.encode_response(answer.text)
            taught = answer.token_ids[-len(self._tag) :] == self._tag
            bodies.append(body)
            rest.append(answer.token_ids[len(body) :] if taught and length is not None else self._closing)
        parts = self._states(prompts, bodies, rest)
        rows = []
        for record, answer, (prompt, h) in zip(records, answers, parts, strict=True):
            assert record.verifier is not None
            right = load_verifier(record.verifier)(answer.text, record.reference) is True
            complete = answer.tag_found or self.chat.end_id in answer.token_ids
            rows.append(
                {
                    "text": answer.text,
                    "label": int(right),
                    "complete": complete,
                    "h": h,
                    "prompt": prompt,
                    "digest": record.prompt_digest,
                }
            )
        return rows

    @torch.inference_mode()
    def read(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Prompts alone: the same dicts, with label 0, no text, and h of NaN."""
        prompts = [self.chat.encode_chat(record.messages) for record in records]
        nothing: list[list[int]] = [[] for _ in prompts]
        return [
            {
                "text": "",
                "label": 0,
                "complete": False,
                "h": torch.full_like(h, torch.nan),
                "prompt": prompt,
                "digest": record.prompt_digest,
            }
            for record, (prompt, h) in zip(records, self._states(prompts, nothing, nothing), strict=True)
        ]

    @torch.inference_mode()
    def along(
        self, records: Sequence[Record], texts: Sequence[str], checks: Sequence[int]
    ) -> list[tuple[int, Tensor]]:
        """Of every answer, given as text: its tokens, and (checks, 2 H + 6) mean and last state and evidence after so
        many of them, NaN where there are no more."""
        prompts = [self.chat.encode_chat(record.messages) for record in records]
        bodies = [self.chat.encode_response(text) for text in texts]
        whole = [[*p, *b] for p, b in zip(prompts, bodies, strict=True)]
        width = max(map(len, whole))
        ids = torch.tensor([ids + [self.chat.end_id] * (width - len(ids)) for ids in whole])
        states = self._model.model(ids).last_hidden_state
        found = []
        for row, (p, b) in enumerate(zip(prompts, bodies, strict=True)):
            own = states[row, : len(p) + len(b)]
            logits = self._model.lm_head(own[len(p) - 1 : -1])
            measured = surprisal_and_margin(logits, torch.tensor(list(b))) if b else torch.empty(0, 2)
            sums = own.float().cumsum(0)
            at = torch.full((len(checks), 2 * own.shape[1] + len(EVIDENCE)), torch.nan)
            for number, check in enumerate(checks):
                if check < len(b):
                    end = len(p) + check - 1
                    evidence = features(EVIDENCE, measured[:check, 0].tolist(), measured[:check, 1].tolist())
                    at[number] = torch.cat([sums[end] / (end + 1), own[end].float(), evidence])
            found.append((len(b), at))
        return found

    def _generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy, each until its tag, its end or the limit: the ids of each, tag and end included."""
        from transformers import DynamicCache

        width = max(map(len, prompts))
        ids = torch.tensor([[self.chat.end_id] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        written: list[list[int]] = [[] for _ in prompts]
        open_ = list(range(len(prompts)))
        for _ in range(max_tokens):
            out = self._model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            token = out.logits[:, -1].float().argmax(1)
            for row in open_:
                written[row].append(int(token[row]))
            open_ = [row for row in open_ if not self._ended(written[row])]
            if not open_:
                break
            ids, positions = token.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return written

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1] == self.chat.end_id or ids[-len(self._tag) :] == self._tag

    def _states(
        self,
        prompts: Sequence[Sequence[int]],
        bodies: Sequence[Sequence[int]],
        rest: Sequence[Sequence[int]],
    ) -> list[tuple[Tensor, Tensor]]:
        whole = [[*p, *b, *r] for p, b, r in zip(prompts, bodies, rest, strict=True)]
        width = max(map(len, whole))
        ids = torch.tensor([ids + [self.chat.end_id] * (width - len(ids)) for ids in whole])
        states = self._model.model(ids).last_hidden_state  # (b, width, H), normed
        found = []
        for row, (p, b, sequence) in enumerate(zip(prompts, bodies, whole, strict=True)):
            own = states[row, : len(sequence)].float()
            evidence = torch.zeros(len(EVIDENCE))
            if b:
                at = states[row, len(p) - 1 : len(p) + len(b) - 1]
                measured = surprisal_and_margin(self._model.lm_head(at), torch.tensor(list(b)))
                evidence = features(EVIDENCE, measured[:, 0].tolist(), measured[:, 1].tolist())
            prompt = torch.cat([own[: len(p)].mean(0), own[len(p) - 1]])
            found.append((prompt, torch.cat([own.mean(0), own[-1], evidence])))
        return found


def collect(model: BatchedModel, records: Sequence[Record], path: Path, max_tokens: int = 64) -> Answered:
    """Answers of `records`, out of `path` as far as they stand there. max_tokens 0: their prompts are only read."""
    rows: dict[int, dict[str, Any]] = torch.load(path) if path.exists() else {}
    size = {i: sum(len(message["content"]) for message in records[i].messages) for i in range(len(records))}
    todo = sorted((i for i in size if i not in rows), key=lambda i: (size[i], i))
    for start in tqdm(range(0, len(todo), BATCH), desc=path.stem, disable=not todo):
        batch = todo[start : start + BATCH]
        some = [records[i] for i in batch]
        found = model.answer(some, max_tokens) if max_tokens else model.read(some)
        rows |= dict(zip(batch, found, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return stacked(rows)


def stacked(rows: dict[int, dict[str, Any]]) -> Answered:
    ordered = [rows[i] for i in sorted(rows)]
    return Answered(
        torch.stack([row["prompt"] for row in ordered]),
        torch.stack([row["h"] for row in ordered]),
        torch.tensor([row["label"] for row in ordered]),
        torch.tensor([row["complete"] for row in ordered]),
        tuple(row["digest"] for row in ordered),
        tuple(row["text"] for row in ordered),
    )


def load(path: Path) -> Answered:
    """What `collect` has kept so far."""
    return stacked(torch.load(path))
