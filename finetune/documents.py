"""The documents of one set of pairs, training or held-out; random draws decide which answer a pair shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from candor.calibration.data import Record
from candor.engine.base import Representation
from candor.engine.prompt import ChatFormat
from candor.finetune.data import Pair
from candor.finetune.errors import FinetuneError
from candor.finetune.examples import Example, negative, positive
from candor.finetune.negatives import Negatives
from candor.finetune.settings import FinetuneSettings
from candor.policy.conversation import Conversations

TAG = Representation().tag


def encoded(
    asked: Sequence[Pair | Record], chat: ChatFormat, system_prompt: str | None, kind: str
) -> list[list[int]]:
    """Token ids of each conversation, as it is served. kind: what one is called.

    Raises FinetuneError for a system message beside `system_prompt`.
    """
    served = Conversations.of_records([one.messages for one in asked], system_prompt)
    prompts = []
    for one in asked:
        conversation = served.resolve(one.messages)
        if conversation.departure:
            raise FinetuneError(
                f'{kind} "{one.id}": {conversation.departure}; remove its system message, or train without '
                "--system-prompt"
            )
        prompts.append(conversation.encode(chat))
    return prompts


class Documents:
    """name: the set's name, which seeds its draws, so that two sets draw differently."""

    def __init__(
        self, name: str, chat: ChatFormat, pairs: Sequence[Pair], settings: FinetuneSettings
    ) -> None:
        self.pairs = pairs
        self.negatives = Negatives(pairs, settings, name)
        self.prompts = encoded(pairs, chat, settings.system_prompt, "pair")
        self._chat = chat

    def __len__(self) -> int:
        return len(self.pairs)

    def right(self, number: int) -> Example:
        return positive(self._chat, self.prompts[number], self.pairs[number].positive, TAG)

    def example(self, purpose: str, epoch: int, number: int) -> tuple[Example, int]:
        """Returns the document to show and its r (1: right answer, 0: wrong)."""
        if self.negatives.is_positive(purpose, epoch, number):
            return self.right(number), 1
        wrong = self.negatives.pick(purpose, epoch, number)
        return negative(self._chat, self.prompts[number], wrong, TAG), 0

    def examples(self, purpose: str, epoch: int) -> tuple[list[Example], Tensor]:
        shown = [self.example(purpose, epoch, number) for number in range(len(self))]
        return [example for example, _ in shown], torch.tensor([r for _, r in shown])
