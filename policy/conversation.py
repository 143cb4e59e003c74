"""Conversations as they are put to the model: the system prompt, the order of roles and the template's arguments.

A layer knows only the kinds of conversation that it was calibrated on. The policy therefore stores the three
properties above, which do not depend on the content of the turns. A conversation in which any of them differs departs
from the policy.

    system prompt   none      no record had one
                    fixed     one text leads every conversation, also if a request brings none
                    records   the records brought their own; the policy stores the digests of these texts
    turns           the roles after the system prompt, such as "user" or "user assistant user"
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from candor.engine.prompt import ChatFormat

Turn = dict[str, str]
"""{"role", "content"}."""

BREAK = "\n\n"
"""Stands between an input and the question about it (`policy.decisions`)."""

_SYSTEM = "system"
_QUESTIONS = ("predicate", "choice", "score")
_ROLE = re.compile(r"(?:^|\n)(system|user|assistant): ")


@dataclass(frozen=True)
class SystemPrompt:
    """text: only for kind "fixed". digests: only for kind "records", the `digest` of each text, sorted.

    optional: some of those records had none. Raises ValueError if the fields disagree.
    """

    kind: Literal["none", "fixed", "records"] = "none"
    text: str | None = None
    digests: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        of_records = self.kind == "records"
        if (self.text is not None) != (self.kind == "fixed") or (
            (bool(self.digests) or self.optional) and not of_records
        ):
            raise ValueError(
                'a system prompt of kind "fixed" has a text, one of kind "records" has digests, and '
                f'one of kind "none" has neither; got {self}'
            )

    @classmethod
    def fixed(cls, text: str | None) -> SystemPrompt:
        """Returns the fixed system prompt with that text; None means no system prompt."""
        return cls() if text is None else cls("fixed", text)

    @classmethod
    def of_records(cls, conversations: Iterable[Sequence[Turn]]) -> SystemPrompt:
        """Returns the system prompts that these conversations bring."""
        texts = {_leading(turns) for turns in conversations}
        found = {digest(text) for text in texts if text is not None}
        return cls("records", None, tuple(sorted(found)), None in texts) if found else cls()

    def lead(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns with the fixed system prompt in front, unless they have their own."""
        if self.text is None or any(turn["role"] == _SYSTEM for turn in turns):
            return list(turns)
        return [{"role": _SYSTEM, "content": self.text}, *turns]

    def departure(self, turns: Sequence[Turn]) -> str | None:
        """Returns why the system prompt of these turns, after `lead`, was not calibrated; None if it was."""
        text = _leading(turns)
        match self.kind:
            case "none":
                return None if text is None else "it has a system prompt, and calibration had none"
            case "fixed":
                return None if text == self.text else "its system prompt is not the calibrated one"
            case "records":
                if text is None:
                    return (
                        None
                        if self.optional
                        else "it has no system prompt, and every calibration record had one"
                    )
                return (
                    None
                    if digest(text) in self.digests
                    else "its system prompt is none of the calibration records'"
                )


GRAMMAR = "structured_outputs"
"""The template argument that is no template's: what answers are held to, in vLLM's form."""


@dataclass(frozen=True)
class Conversations:
    """The calibrated conversations. turns: orders of roles (`order`). template_arguments: for the chat template, and
    `GRAMMAR` for the engine."""

    system_prompt: SystemPrompt = SystemPrompt()
    turns: tuple[str, ...] = ("user",)
    template_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def grammar(self) -> str | None:
        """What answers are held to, as `Sampling` has it."""
        asked = self.template_arguments.get(GRAMMAR)
        return None if asked is None else json.dumps(asked, sort_keys=True)

    @property
    def for_template(self) -> dict[str, Any]:
        """The template arguments without the grammar."""
        return {name: value for name, value in self.template_arguments.items() if name != GRAMMAR}

    @property
    def decides(self) -> bool:
        """Whether these are decisions (`policy.decisions`)."""
        return any(one.split()[-1:] == [kind] for one in self.turns for kind in _QUESTIONS)

    @classmethod
    def of_records(
        cls,
        conversations: Sequence[Sequence[Turn]],
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Conversations:
        """Returns those of calibration records. system_prompt: if not None, it leads each of them."""
        system = SystemPrompt.fixed(system_prompt)
        if system_prompt is None:
            system = SystemPrompt.of_records(conversations)
        orders = {order(turns) for turns in conversations}
        return cls(system, tuple(sorted(orders)), dict(template_arguments or {}))

    def resolve(
        self, turns: Sequence[Turn], template_arguments: Mapping[str, Any] | None = None
    ) -> Conversation:
        """Returns the conversation as the model gets it. template_arguments: None takes the calibrated ones."""
        led = self.system_prompt.lead(turns)
        calibrated = self.for_template
        arguments = calibrated if template_arguments is None else dict(template_arguments)
        departure = self.system_prompt.departure(led)
        if departure is None and (found := order(led)) not in self.turns:
            departure = (
                f"its turns ({found}) are none of those calibrated ({', '.join(self.turns) or 'none'})"
            )
        if departure is None and arguments != calibrated:
            departure = f"its template arguments {arguments} are not the calibrated {calibrated}"
        return Conversation(tuple(led), arguments, departure)


@dataclass(frozen=True)
class Conversation:
    """turns: all turns that the model gets. departure: why they were not calibrated; None if they were."""

    turns: tuple[Turn, ...]
    template_arguments: dict[str, Any]
    departure: str | None

    def encode(self, chat: ChatFormat) -> list[int]:
        """Returns its token ids, up to where the answer begins. Raises ValueError if the template refuses it."""
        *before, last = self.turns
        if last["role"] in _QUESTIONS:
            return chat.encode_endings(before, [BREAK + last["content"]], self.template_arguments)[0]
        return chat.encode_chat(self.turns, self.template_arguments)


def order(turns: Sequence[Turn]) -> str:
    """Returns the roles in order, without a leading system prompt: "user assistant user"."""
    roles = [turn["role"] for turn in turns]
    return " ".join(roles[1:] if roles[:1] == [_SYSTEM] else roles)


def digest(text: str) -> str:
    """Returns the digest of a system prompt: 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def shown(turns: Sequence[Turn]) -> str:
    """Returns a conversation as readable text: the content of a single user turn, else "role: content" lines."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def taken_apart(text: str) -> tuple[Turn, ...]:
    """Returns the turns of a text made by `shown`. It can split wrongly where a content itself looks like turns."""
    parts = _ROLE.split(text)
    if parts[0]:
        return ({"role": "user", "content": text},)
    return tuple({"role": role, "content": said} for role, said in zip(parts[1::2], parts[2::2], strict=True))


def _leading(turns: Sequence[Turn]) -> str | None:
    """Returns the leading system prompt. Later system prompts count as turns."""
    return turns[0]["content"] if turns and turns[0]["role"] == _SYSTEM else None
