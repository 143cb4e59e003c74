"""Converts messages to token ids and back: the chat template and the verification tag, the same for every engine.

A chat template marks the speaker with control tokens (`<|im_start|>`, ...). If a user's text were rendered into the
template and the whole tokenised, a user could type a marker and speak in another role. So engine/template.py
separates the users' texts from the template, and each text is tokenised with control tokens disabled: a user's text
never becomes a control token.

Some tokenizers put a space before their input (SentencePiece: Llama 2, Mistral, Phi-3). A text that follows other
text is given to them after an anchor, whose tokens are then removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from candor.engine.base import EngineError
from candor.engine.template import Messages, Rendered, render

SEPARATOR = "\n"
"""Separates an answer from its tag."""

TODAY = "today"
"""Name of the template argument with the date, as in 2026-01-31, for templates that use it."""

_ANCHOR = "\ue003"  # no tokenizer merges it with what follows
_JOINTS = range(0xF0000, 0xFFFFE)
"""Private-use characters, of which one that the texts lack shows where an ending goes."""
_MARKER_LIKE = re.compile(r"<\|.*\|>|\[/?[A-Z_]+\]")


class ChatFormat:
    """One model's tokenizer and chat template.

    end_ids: tokens that end an answer, besides the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        own = tokenizer.eos_token_id
        self.end_ids = frozenset(end_ids) | ({own} if own is not None else frozenset())

    @classmethod
    def from_directory(cls, path: Path) -> ChatFormat:
        """Reads tokenizer and template of the model at `path`, without access to a hub or remote code.

        Raises EngineError if there is no such directory, if it has no tokenizer, or if the model names several
        templates and none of them is the default.
        """
        if not path.is_dir():
            raise EngineError(
                f"{path} is not a directory, and Candor asks no model hub: download the model, for example with "
                "`hf download NAME --local-dir DIR`, and give its directory"
            )
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{path} has no tokenizer that transformers can read; expected tokenizer.json or the like, and "
                f"tokenizer_config.json beside the model: {str(error).splitlines()[0]}"
            ) from error
        chat = cls(tokenizer, _end_ids(path))
        chat.template  # noqa: B018  known at start
        return chat

    @property
    def template(self) -> str:
        """The chat template's source; the one named "default" if there are several, empty if there is none."""
        source = self._tokenizer.chat_template or ""
        if isinstance(source, Mapping):
            if "default" not in source:
                raise EngineError(
                    f"this model's chat templates are named {', '.join(map(repr, source))}; expected one named "
                    "'default': name it so in the model's tokenizer_config.json or chat_template.jinja"
                )
            source = source["default"]
        return str(source)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        end: int = self._tokenizer.eos_token_id
        return end

    @cached_property
    def longest_token(self) -> int:
        """Maximum characters of a text that one token stands for. A control token counts as the text it is."""
        return max(map(len, self._tokenizer.get_vocab()))

    def encode_chat(
        self, messages: Messages, template_arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a conversation ({"role", "content"} each) up to where the assistant's answer begins.

        template_arguments: further arguments of the chat template, for example {"enable_thinking": False}, or
        {"today": "2026-01-31"} for a template that writes the date.
        Raises ValueError if the model has no template or the template refuses the conversation.
        """
        if not self.template:
            raise ValueError("this model has no chat template; use plain completions instead")
        rendered = self._render(messages, template_arguments or {})
        encode = cache(self._encode)  # a template repeats its pieces
        own = self._controls([encode(piece, False) for piece in rendered.own])
        if self._puts_space_before and not any(self._markers_in(m["content"]) for m in messages):
            # The model was trained this way: a token may span the boundary of a text.
            whole = self._encode(rendered.text)
            if self._controls([whole]) == own:
                return whole
        ids: list[list[int]] = []
        for piece, is_text in rendered.pieces:
            follows = self._puts_space_before and bool(ids)
            ids.append(self._encode_as_text(piece, follows) if is_text else encode(piece, follows))
        if self._controls(ids) != own:
            raise ValueError(
                "these messages would make control tokens of the model's chat template; leave them out"
            )
        return [token for piece in ids for token in piece]

    def encode_endings(
        self,
        messages: Messages,
        endings: Sequence[str],
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """As `encode_chat`, once for each ending put behind the last message's text.

        Text and ending are tokenised apart, so that all have their beginning in common, which is tokenised once.
        """
        if not self.template:
            raise ValueError("this model has no chat template; decisions need one")
        used = {letter for message in messages for letter in message["content"]}
        joint = next((mark for mark in map(chr, _JOINTS) if mark not in used), None)
        if joint is None:
            raise ValueError("the last message holds every private-use character there is; leave some out")
        *before, last = messages
        rendered = self._render(
            [*before, {**last, "content": last["content"] + joint}], template_arguments or {}
        )
        own = self._controls([self._encode(piece) for piece in rendered.own])
        head: list[int] = []
        tail: list[int] = []
        side = head
        for piece, is_text in rendered.pieces:
            for number, part in enumerate(piece.split(joint)):
                side = tail if number else side
                follows = self._puts_space_before and bool(side is tail or head)
                if part:
                    side += self._encode_as_text(part, follows) if is_text else self._encode(part, follows)
        controls, closing = self._controls([head]), self._controls([tail])
        found = []
        for ending in endings:
            ids = self._encode_as_text(ending, self._puts_space_before)
            if side is head or [*controls, *self._controls([ids]), *closing] != own:
                raise ValueError(
                    "these texts would make control tokens of the model's chat template; leave them out"
                )
            found.append([*head, *ids, *tail])
        return found

    def check(self, template_arguments: Mapping[str, Any]) -> None:
        """Raises EngineError if the template renders no conversation with these arguments; called at start."""
        if self.template:
            try:
                self.encode_chat([{"role": "user", "content": "a"}], template_arguments)
            except ValueError as error:
                raise EngineError(str(error)) from error

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the start token if the tokenizer adds one."""
        first, *others = self._cut(text)
        ids = self._tokenise(first, split_special_tokens=True)
        for other in others:
            ids += self._encode_as_text(other, follows=True)
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer from its beginning; the text never becomes a control token."""
        return self._encode_as_text(text, follows=not self._answers_begin_with_space)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows an answer: separator, tag, verdict."""
        return self._encode_as_text(text, follows=True)

    def closing(self, tag: str) -> tuple[list[int], list[int]]:
        """Returns (ids of separator and tag after an answer, ids of the tag alone).

        Raises EngineError if the tokenizer makes one token from parts of both.
        """
        separator, closing = map(self.encode_continuation, (SEPARATOR, SEPARATOR + tag))
        if closing[: len(separator)] != separator or len(closing) == len(separator):
            raise EngineError(
                f"this model's tokenizer makes {closing} of a line break and the tag {tag!r}, which does not begin "
                f"with the line break's {separator}: the tag has no tokens of its own; take one that begins otherwise"
            )
        return closing, closing[len(separator) :]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def is_blank(self, token_id: int) -> bool:
        """Whether a token shows no text: it is white space, a control token or an end token."""
        return token_id in self.end_ids or not self.decode([token_id]).strip()

    def _render(self, messages: Messages, arguments: Mapping[str, Any]) -> Rendered:
        return render(lambda some: self._apply(some, arguments), messages, self._markers.values())

    def _apply(self, messages: Messages, arguments: Mapping[str, Any]) -> str:
        given = {name: value for name, value in arguments.items() if name != TODAY}
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=lambda form: _date(arguments.get(TODAY)).strftime(form),
                **given,
            )
        except Exception as error:  # jinja2's own errors and those a template raises have no common base
            raise ValueError(f"the model's chat template refused these messages: {error}") from error
        return text

    def _encode(self, text: str, follows: bool = False) -> list[int]:
        """Ids of the template's own text, control tokens included. follows: whether other text comes before."""
        return self._behind_anchor(text, follows, split_special_tokens=False)

    def _encode_as_text(self, text: str, follows: bool) -> list[int]:
        parts = self._cut(text)
        ids: list[int] = []
        for part in parts:
            ids += self._without_controls(part, follows or bool(ids))
        return ids

    def _without_controls(self, text: str, follows: bool) -> list[int]:
        """If the tokenizer still finds a control token (it may normalise the text), the text is split in halves."""
        ids = self._behind_anchor(text, follows, split_special_tokens=True)
        if self._markers.keys().isdisjoint(ids) or len(text) < 2:
            return ids
        half = len(text) // 2
        return [*self._without_controls(text[:half], follows), *self._without_controls(text[half:], True)]

    def _behind_anchor(self, text: str, follows: bool, **how: bool) -> list[int]:
        anchored = follows and self._puts_space_before
        whole = self._tokenise(_ANCHOR + text if anchored else text, add_special_tokens=False, **how)
        return whole[len(self._anchor_ids) :] if anchored else whole

    def _tokenise(self, text: str, **how: bool) -> list[int]:
        """Tokenises one text at a time: a tokenizer switches control tokens on and off for all threads."""
        with self._lock:
            ids: list[int] = self._tokenizer(text, **how)["input_ids"]
        return ids

    def _cut(self, text: str) -> list[str]:
        """Splits the text inside each marker that is not a special token: tokenizers find those in any text."""
        return self._inside_plain_markers.split(text) if self._inside_plain_markers else [text]

    def _markers_in(self, text: str) -> bool:
        return any(marker in text for marker in self._markers.values())

    def _controls(self, pieces: Iterable[Sequence[int]]) -> list[int]:
        return [token for piece in pieces for token in piece if token in self._markers]

    @cached_property
    def _markers(self) -> dict[int, str]:
        """Control tokens: special tokens, end tokens, and others with which the template marks turns.

        A pair such as <think> and </think> that a plain conversation lacks is not among them: it occurs within texts.
        """
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        plain = {
            str(entry.content) for entry in added.values() if not entry.special and entry.content.strip()
        }
        turns = self._plain_conversation if plain else ""

        def marks(token: int, text: str) -> bool:
            pair = {text, text.replace("</", "<"), text.replace("<", "</", 1)}
            return text in plain and (
                token in self.end_ids
                or text in turns
                or _MARKER_LIKE.fullmatch(text) is not None
                or (text in self.template and len(pair & plain) < 2)
            )

        # Any text may contain the token for unknown characters.
        unknown = {getattr(self._tokenizer, "unk_token_id", None)} - self.end_ids
        return {
            token: str(entry.content)
            for token, entry in added.items()
            if token not in unknown and (entry.special or marks(token, str(entry.content)))
        }

    @property
    def _plain_conversation(self) -> str:
        """A short conversation rendered by the template; empty if the template refuses all of those tried."""
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        for some in (turns, turns[1:], turns[1:2]):
            try:
                return self._apply(some, {TODAY: "2000-01-01"})
            except ValueError:
                continue
        return ""

    @cached_property
    def _inside_plain_markers(self) -> re.Pattern[str] | None:
        """Matches after the first character of each marker that is not special."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        plain = [text for token, text in self._markers.items() if not added[token].special and len(text) > 1]
        behind = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in plain)
        return re.compile("|".join(behind)) if plain else None

    @cached_property
    def _anchor_ids(self) -> list[int]:
        return self._tokenise(_ANCHOR, add_special_tokens=False)

    @cached_property
    def _puts_space_before(self) -> bool:
        """Whether a text at the beginning is tokenised differently from the same text further on."""
        alone, further = (self._tokenise(t, add_special_tokens=False) for t in ("a", _ANCHOR + "a"))
        anchor = self._anchor_ids
        return bool(anchor) and further[: len(anchor)] == anchor and further[len(anchor) :] != alone

    @cached_property
    def _answers_begin_with_space(self) -> bool:
        """Whether an answer directly after the template's end is tokenised with the leading space.

        Some tokenizers add it after a control token, others do not.
        """
        if not self._puts_space_before or not self.template:
            return False
        prompt = self._plain_conversation
        return bool(prompt) and self._encode(prompt + "a") == [*self._encode(prompt), *self._encode("a")]


def _end_ids(model: Path) -> Collection[int]:
    """End tokens from generation_config.json, or from config.json without it; both engines stop at them."""
    for name in ("generation_config.json", "config.json"):
        if (model / name).is_file():
            config = json.loads((model / name).read_text(encoding="utf-8"))
            ends = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
            return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return []


def _date(today: object) -> date:
    if not isinstance(today, str):
        raise ValueError(
            "it writes today's date, so the same messages would give another prompt each day; give it one date "
            f'for good, as the template argument "{TODAY}": "2026-01-31"'
        )
    return date.fromisoformat(today)
