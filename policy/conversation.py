"""Conversations as they are put to the model: who speaks in which order, and what leads them.

A layer knows the conversations that it was calibrated on. So the policy holds them as far as they can be told apart
without their content: the system prompt, the order of the turns and the template's arguments. Every other
conversation departs from the policy, whatever makes it another.

    system prompt   none      no record had one
                    fixed     one text leads every conversation, also where a request brings none
                    records   the records brought their own: these texts, by digest
    turns           the roles after the system prompt, such as "user" or "user assistant user"
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from candor.engine.prompt import ChatFormat

Turn = dict[str, str]
"""{"role", "content"}."""

_SYSTEM = "system"
_ROLE = re.compile(r"(?:^|\n)(system|user|assistant): ")


@dataclass(frozen=True)
class SystemPrompt:
    """text: of kind "fixed" alone. digests: of kind "records" alone, `digest` of each text, sorted.

    optional: some of those records had none. Raises ValueError where the fields disagree.
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
        """Of that text, or none."""
        return cls() if text is None else cls("fixed", text)

    @classmethod
    def of_records(cls, conversations: Iterable[Sequence[Turn]]) -> SystemPrompt:
        """What these conversations bring."""
        texts = {_leading(turns) for turns in conversations}
        found = {digest(text) for text in texts if text is not None}
        return cls("records", None, tuple(sorted(found)), None in texts) if found else cls()

    def lead(self, turns: Sequence[Turn]) -> list[Turn]:
        """The conversation with the fixed system prompt before it, where it has none of its own."""
        if self.text is None or any(turn["role"] == _SYSTEM for turn in turns):
            return list(turns)
        return [{"role": _SYSTEM, "content": self.text}, *turns]

    def departure(self, turns: Sequence[Turn]) -> str | None:
        """Why the system prompt of these turns, led already, is none that was calibrated."""
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


@dataclass(frozen=True)
class Conversations:
    """Those that were calibrated. turns: orders of roles (`order`). template_arguments: of the chat template."""

    system_prompt: SystemPrompt = SystemPrompt()
    turns: tuple[str, ...] = ("user",)
    template_arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_records(
        cls,
        conversations: Sequence[Sequence[Turn]],
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Conversations:
        """Those of calibration records. system_prompt: leads each of them, where it is not None."""
        system = SystemPrompt.fixed(system_prompt)
        if system_prompt is None:
            system = SystemPrompt.of_records(conversations)
        orders = {order(turns) for turns in conversations}
        return cls(system, tuple(sorted(orders)), dict(template_arguments or {}))

    def resolve(
        self, turns: Sequence[Turn], template_arguments: Mapping[str, Any] | None = None
    ) -> Conversation:
        """The conversation as it is put to the model. template_arguments: None takes the calibrated ones."""
        led = self.system_prompt.lead(turns)
        arguments = self.template_arguments if template_arguments is None else dict(template_arguments)
        departure = self.system_prompt.departure(led)
        if departure is None and (found := order(led)) not in self.turns:
            departure = (
                f"its turns ({found}) are none of those calibrated ({', '.join(self.turns) or 'none'})"
            )
        if departure is None and arguments != self.template_arguments:
            departure = f"its template arguments {arguments} are not the calibrated {self.template_arguments}"
        return Conversation(tuple(led), arguments, departure)


@dataclass(frozen=True)
class Conversation:
    """turns: all that is put to the model. departure: why it is none that was calibrated, None if it is one."""

    turns: tuple[Turn, ...]
    template_arguments: dict[str, Any]
    departure: str | None

    def encode(self, chat: ChatFormat) -> list[int]:
        """Its token ids, up to where the answer begins. Raises ValueError where the template refuses it."""
        return chat.encode_chat(self.turns, self.template_arguments)


def order(turns: Sequence[Turn]) -> str:
    """The roles in their order, without a leading system prompt: "user assistant user"."""
    roles = [turn["role"] for turn in turns]
    return " ".join(roles[1:] if roles[:1] == [_SYSTEM] else roles)


def digest(text: str) -> str:
    """Of a system prompt: 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def shown(turns: Sequence[Turn]) -> str:
    """A conversation as one text for people: a single user turn's content alone, else "role: content" lines."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def taken_apart(text: str) -> tuple[Turn, ...]:
    """The turns behind `shown`'s text, as far as they can be told: a content may itself look like turns."""
    parts = _ROLE.split(text)
    if parts[0]:
        return ({"role": "user", "content": text},)
    return tuple({"role": role, "content": said} for role, said in zip(parts[1::2], parts[2::2], strict=True))


def _leading(turns: Sequence[Turn]) -> str | None:
    """The leading system prompt; further ones are turns."""
    return turns[0]["content"] if turns and turns[0]["role"] == _SYSTEM else None
