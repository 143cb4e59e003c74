"""Puts verdicts into the responses that vLLM's handlers wrote, and refusals in place of what is withheld.

Each form of response has two functions: one for a whole body, one for the events of a stream. What is withheld was
empty when the handler wrote it, so these only add.

    chat, completion   `reliability` in the body; in a stream in each choice's last chunk, as in this server's own
    responses          `reliability` in the response; a withheld output is one message with a refusal
    messages           `reliability` in the message; a withheld one ends with the stop reason `refusal`
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from candor.app.answering.service import Answer
from candor.app.writing.bodies import reliability, usage

_dumps = json.JSONEncoder(separators=(",", ":")).encode
_DONE = "data: [DONE]\n\n"
_SET_OFF = "\n\n"
_ENDS = '"finish_reason":"'
"""Only the last chunk of a choice has it unescaped."""

Body = dict[str, Any]


class Verdicts(Protocol):
    """The answers judged so far (`app.answering.judging.Judging`). buffered: nothing was shown before its verdict."""

    @property
    def answers(self) -> Mapping[int, Answer]: ...

    @property
    def buffered(self) -> bool: ...

    @property
    def finished(self) -> list[Answer]: ...


class Form(Protocol):
    """How one kind of response shows verdicts."""

    def body(self, body: Body, verdicts: Verdicts) -> Body:
        """Returns a whole response with its verdicts."""
        ...

    def stream(self, events: AsyncGenerator[str, None], verdicts: Verdicts) -> AsyncGenerator[str, None]:
        """Yields the events of a stream with its verdicts."""
        ...


def _shown(answers: Iterable[Answer]) -> dict[str, Any]:
    """Returns the field `reliability`, or nothing in mode off."""
    found = reliability(answers)
    return {} if found is None else {"reliability": found.model_dump(mode="json")}


def _withheld(answers: Iterable[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.replacement is not None]


@dataclass(frozen=True)
class ChatForm:
    """chat.completion and its chunks. head: what a stream's chunks begin with where the handler wrote none.
    counted: every chunk has its usage."""

    head: Mapping[str, Any] = field(default_factory=dict)
    counted: bool = False

    def body(self, body: Body, verdicts: Verdicts) -> Body:
        choices = {choice["index"]: choice for choice in body["choices"]}
        for answer in _withheld(verdicts.finished):
            choices[answer.index] |= self._ended(answer) | self._instead(answer)
            choices[answer.index] |= {"logprobs": None, "token_ids": None, "stop_reason": None}
        return body | _shown(verdicts.finished)

    async def stream(
        self, events: AsyncGenerator[str, None], verdicts: Verdicts
    ) -> AsyncGenerator[str, None]:
        ended: set[int] = set()
        head: Body = {}

        def made(answer: Answer, chunk: Body) -> str:
            prompt = answer.generation.prompt_tokens
            counts = {"usage": usage(prompt, [answer]).model_dump()} if self.counted else {}
            return _event({**(head or self.head)} | chunk | counts)

        async for event in events:
            totals = '"choices":[]' in event
            chunk: Body | None = None
            if event != _DONE and (_ENDS in event or not head or totals):
                chunk = json.loads(event.removeprefix("data: "))
                if "error" in chunk:
                    yield event
                    continue
                head = head or {k: v for k, v in chunk.items() if k in ("id", "object", "created", "model")}
            if event == _DONE or totals:
                for answer in verdicts.finished:
                    if answer.index not in ended:  # the handler writes no chunk of an empty choice
                        ended.add(answer.index)
                        for one in self._ending(answer, ""):
                            yield made(answer, one)
            if chunk is not None:
                for choice in chunk["choices"]:
                    if choice["finish_reason"] is None:
                        continue
                    answer = verdicts.answers[choice["index"]]
                    ended.add(answer.index)
                    *said, last = self._ending(answer, _SET_OFF if answer.generation.text else "")
                    for one in said:
                        yield made(answer, one)
                    chunk |= last if said else _shown([answer])
                if totals:
                    chunk |= _shown(verdicts.finished)
                event = _event(chunk)
            yield event

    def _ending(self, answer: Answer, separator: str) -> list[Body]:
        """Returns the chunk with the text in place of a withheld answer, and the last chunk of its choice."""
        last = {"choices": [self._last(answer) | self._ended(answer) | {"logprobs": None}]} | _shown([answer])
        if answer.replacement is None:
            return [last]
        return [
            {"choices": [self._piece(answer, separator) | {"logprobs": None, "finish_reason": None}]},
            last,
        ]

    def _ended(self, answer: Answer) -> Body:
        reason = "stop" if answer.replacement else answer.generation.finish_reason
        return {"index": answer.index, "finish_reason": reason}

    def _instead(self, answer: Answer) -> Body:
        return {"message": {"role": "assistant"} | _said(answer)}

    def _piece(self, answer: Answer, separator: str) -> Body:
        return {"index": answer.index, "delta": _said(answer, separator)}

    def _last(self, answer: Answer) -> Body:
        return {"delta": {}}


class CompletionForm(ChatForm):
    """text_completion and its chunks."""

    def _instead(self, answer: Answer) -> Body:
        return self._text(answer, "") | {"prompt_logprobs": None}

    def _piece(self, answer: Answer, separator: str) -> Body:
        return {"index": answer.index} | self._text(answer, separator)

    def _last(self, answer: Answer) -> Body:
        return {"text": ""}

    @staticmethod
    def _text(answer: Answer, separator: str) -> Body:
        said = _said(answer, separator)
        return {"text": said.get("content") or ""} | ({"refusal": said["refusal"]} if said["refusal"] else {})


def _said(answer: Answer, separator: str = "") -> Body:
    """Returns content and refusal in place of a withheld answer."""
    instead = answer.replacement
    assert instead is not None
    if instead.as_refusal:
        return {"content": None, "refusal": instead.text}
    return {"content": separator + instead.text, "refusal": None}


class ResponsesForm:
    """OpenAI's `response` and its events."""

    def body(self, body: Body, verdicts: Verdicts) -> Body:
        if (withheld := _withheld(verdicts.finished)) and body["status"] != "failed":
            body = body | {"status": "completed", "incomplete_details": None, "output": [_item(withheld[0])]}
        return body | _shown(verdicts.finished)

    async def stream(
        self, events: AsyncGenerator[str, None], verdicts: Verdicts
    ) -> AsyncGenerator[str, None]:
        async for event in events:
            kind, _, data = event.partition("\ndata: ")
            name = kind.removeprefix("event: ")
            if verdicts.buffered and _withheld(verdicts.finished):
                if name in ("response.created", "response.in_progress"):
                    yield event
                elif name in ("response.completed", "response.incomplete"):
                    for one in self._refusing(json.loads(data), verdicts):
                        yield f"event: {one['type']}\ndata: {_dumps(one)}\n\n"
            elif name in ("response.completed", "response.incomplete"):
                last = json.loads(data)
                last["response"] = self.body(last["response"], verdicts)
                yield f"{kind}\ndata: {_dumps(last)}\n\n"
            else:
                yield event

    def _refusing(self, last: Body, verdicts: Verdicts) -> list[Body]:
        """Returns the events of a response that is a refusal alone. last: the event that ends it, as it came."""
        response = self.body(last["response"], verdicts)
        item = response["output"][0]
        part = item["content"][0]
        empty = part | ({"refusal": ""} if part["type"] == "refusal" else {"text": ""})
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        name = "response.refusal" if part["type"] == "refusal" else "response.output_text"
        text = part.get("refusal") or part.get("text")
        whole = {"refusal": text} if part["type"] == "refusal" else {"text": text, "logprobs": []}
        more: Body = {} if part["type"] == "refusal" else {"logprobs": []}
        begun = item | {"status": "in_progress", "content": []}
        events: list[Body] = [
            {"type": "response.output_item.added", "output_index": 0, "item": begun},
            {"type": "response.content_part.added", "part": empty} | at,
            {"type": f"{name}.delta", "delta": text} | more | at,
            {"type": f"{name}.done"} | whole | at,
            {"type": "response.content_part.done", "part": part} | at,
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": response},
        ]
        return [event | {"sequence_number": number} for number, event in enumerate(events, 2)]


def _item(answer: Answer) -> Body:
    """Returns the output item in place of a withheld answer."""
    said = _said(answer)
    if said["refusal"]:
        part = {"type": "refusal", "refusal": said["refusal"]}
    else:
        part = {"type": "output_text", "text": said["content"], "annotations": [], "logprobs": []}
    return {
        "id": "msg_withheld",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


class MessagesForm:
    """Anthropic's `message` and its events."""

    def body(self, body: Body, verdicts: Verdicts) -> Body:
        for answer in _withheld(verdicts.finished):
            body = body | {
                "content": [{"type": "text", "text": _text_of(answer)}],
                "stop_reason": "refusal",
                "stop_sequence": None,
            }
        return body | _shown(verdicts.finished)

    async def stream(
        self, events: AsyncGenerator[str, None], verdicts: Verdicts
    ) -> AsyncGenerator[str, None]:
        blocks = 0
        async for event in events:
            kind, _, data = event.partition("\ndata: ")
            name = kind.removeprefix("event: ")
            withheld = _withheld(verdicts.finished)
            if withheld and verdicts.buffered and name.startswith("content_block"):
                continue
            blocks += name == "content_block_start"
            if name == "message_delta":
                last = json.loads(data)
                for answer in withheld:
                    for one in _block(blocks, _text_of(answer)):
                        yield f"event: {one['type']}\ndata: {_dumps(one)}\n\n"
                    last["delta"]["stop_reason"] = "refusal"
                event = f"{kind}\ndata: {_dumps(last | _shown(verdicts.finished))}\n\n"
            yield event


def _block(index: int, text: str) -> Sequence[Body]:
    """Returns the events of a text block."""
    return (
        {
            "type": "content_block_start",
            "index": index,
            "content_block": {"type": "text", "text": "", "citations": None},
        },
        {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": index},
    )


def _text_of(answer: Answer) -> str:
    assert answer.replacement is not None
    return answer.replacement.text


def _event(chunk: Body) -> str:
    return f"data: {_dumps(chunk)}\n\n"


FORMS: Mapping[str, Form] = {
    "chat": ChatForm(),
    "batch": ChatForm(),
    "completion": CompletionForm(),
    "responses": ResponsesForm(),
    "messages": MessagesForm(),
}
