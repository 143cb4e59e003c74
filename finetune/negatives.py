"""Chooses the wrong answers to learn from: the static one of each pair, and those the model itself generates.

In each epoch, a negative document is either the pair's static negative or a generated one. Generated ones come
from the current model, greedily, and are used only if the verifier calls them wrong (arXiv 2510.26183,
section 4: online hard negatives). They remain available for one more epoch.

Every draw depends only on (seed, epoch, document), so a run that was stopped repeats its draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from candor.finetune.data import Pair
from candor.finetune.settings import FinetuneSettings


def draw(*what: object) -> random.Random:
    """Returns a separate random generator for each purpose, seeded by `what`."""
    return random.Random(":".join(map(str, what)))


@dataclass
class Negatives:
    """Negatives of `pairs`, by number. current, last: generated wrong answers of this epoch and the one before.

    side: seeds the draws, so that two sets of pairs draw differently.
    """

    pairs: Sequence[Pair]
    settings: FinetuneSettings
    side: str
    current: dict[int, str] = field(default_factory=dict)
    last: dict[int, str] = field(default_factory=dict)

    def begin_epoch(self) -> None:
        self.last, self.current = self.current, {}

    def is_positive(self, purpose: str, epoch: int, document: int) -> bool:
        """Whether the document is shown as a right answer; `purpose`: "step", "layer" or "evaluation"."""
        settings = self.settings
        return draw(settings.seed, self.side, purpose, epoch, document).random() < settings.gamma_plus

    def to_generate(self, purpose: str, epoch: int, documents: Sequence[int]) -> list[int]:
        """The documents whose negatives are generated anew in this epoch (from 0)."""
        if not self.settings.hard_negatives or epoch < self.settings.generate_from:
            return []
        return [
            document
            for document in documents
            if not self.is_positive(purpose, epoch, document)
            and draw(self.settings.seed, self.side, purpose, "generate", epoch, document).random()
            < self.settings.gamma_gen
        ]

    def offer(self, documents: Sequence[int], responses: Sequence[str]) -> int:
        """Keeps the generated responses that are wrong; returns their number."""
        wrong = {
            document: response
            for document, response in zip(documents, responses, strict=True)
            if not self.pairs[document].is_right(response)
        }
        self.current.update(wrong)
        return len(wrong)

    def pick(self, purpose: str, epoch: int, document: int) -> str:
        """Returns the wrong answer to show."""
        generated = [found[document] for found in (self.last, self.current) if document in found]
        rng = draw(self.settings.seed, self.side, purpose, "pick", epoch, document)
        if generated and rng.random() < self.settings.gamma_diversity:
            return rng.choice(generated)
        return self.pairs[document].negative
