"""A taught model's row without an engine: its states over the answers of the model before, where it gives the same.

    python -m studies.knows.reread --model TAUGHT --records R.jsonl --answers before.pt --out after.pt

One pass over an answer shows whether the taught model prefers each of its tokens to all others. Then its greedy
answer is the same (where it ends is taken from before); else it answers anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from candor.calibration.data import Record
from candor.calibration.data import load as load_records
from candor.engine.base import EVIDENCE
from studies.two_gates.answers import Answered, BatchedModel, load, stacked

AT_ONCE = 16
MIN_MARGIN = EVIDENCE.index("min_margin") - len(EVIDENCE)


class Reader(BatchedModel):
    @torch.inference_mode()
    def reread(self, records: Sequence[Record], before: Answered) -> list[dict[str, Any] | None]:
        """One row a record, as `answer` gives; None where the answer would be another."""
        prompts = [self.chat.encode_chat(record.messages) for record in records]
        bodies = [self.chat.encode_response(text) for text in before.texts]
        parts = self._states(prompts, bodies, [self._closing] * len(bodies))
        return [
            {
                "text": before.texts[i],
                "label": int(before.labels[i]),
                "complete": True,
                "h": h,
                "prompt": prompt,
                "digest": records[i].prompt_digest,
            }
            if before.complete[i] and h[MIN_MARGIN] >= 0
            else None
            for i, (prompt, h) in enumerate(parts)
        ]


def main(
    model: Annotated[Path, typer.Option(help="Directory of the taught model.")],
    records: Annotated[Path, typer.Option(help="The prompts, JSON Lines.")],
    answers: Annotated[Path, typer.Option(help="Greedy answers to them of the model before, .pt, in order.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    torch.set_num_threads(1)
    asked, before, reader = load_records(records).records, load(answers), Reader(model)
    rows: dict[int, dict[str, Any]] = torch.load(out) if out.exists() else {}
    sizes = [sum(len(message["content"]) for message in record.messages) for record in asked]
    todo = sorted((i for i in range(len(asked)) if i not in rows), key=lambda i: sizes[i])
    out.parent.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(todo), AT_ONCE), desc=out.stem, mininterval=10):
        batch = todo[start : start + AT_ONCE]
        found = reader.reread([asked[i] for i in batch], before.take(batch))
        anew = [i for i, row in zip(batch, found, strict=True) if row is None]
        answered = iter(reader.answer([asked[i] for i in anew], 64) if anew else [])
        rows |= {i: row or next(answered) for i, row in zip(batch, found, strict=True)}
        if start // AT_ONCE % 10 == 9 or batch[-1] == todo[-1]:
            torch.save(rows, out)
    after = stacked(rows)
    same = sum(a == b for a, b in zip(after.texts, before.texts, strict=True))
    right = [float(one.labels.double().mean()) for one in (before, after)]
    typer.echo(
        f"{same} of {len(asked)} answers are the same; right {right[0]:.1%} before, {right[1]:.1%} after"
    )


if __name__ == "__main__":
    typer.run(main)
