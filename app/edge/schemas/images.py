"""Images in a conversation: which of them the model is given, and what they count for.

Nothing is fetched for a client unless the operator said from where: the server may reach what its client may not. Nor
does a client name an image: vLLM would take another client's of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from candor.engine.base import RequestRefused

TOKENS = 1000
"""What an image is taken for where its tokens are not known yet."""
_NO_TEXT = ("image", "audio", "video")
_IMAGES = ("image_url", "input_image", "image")
"""Types of a part that is an image: of Chat Completions, of Responses, of Messages."""


class Sees(Protocol):
    """images: whether the model looks at them. fetches: whether the operator said from where they may be fetched."""

    images: bool
    fetches: bool


def check(conversation: Any, where: str, model: Sees) -> None:
    """Raises RequestRefused for a part that the model is not given. where: the conversation's name in the body."""
    for part in _parts(conversation):
        if (why := _not_given(part, model)) is not None:
            raise RequestRefused(
                f"a part of type {part['type'][:40]} is not served: {why}",
                400,
                where,
                "unsupported_parameter",
            )


def lengths(conversation: Any) -> list[int]:
    """Returns the characters of each image, which are no text."""
    return [len(json.dumps(part)) for part in _parts(conversation)]


def _parts(conversation: Any) -> Iterator[dict[str, Any]]:
    """Yields the parts that are images, sounds or films."""
    left = [conversation]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            kind = found.get("type")
            if isinstance(kind, str) and any(name in kind for name in _NO_TEXT):
                yield found
            else:
                left += [found.get("content"), found.get("output")]  # not what a tool was called with
        elif isinstance(found, list):
            left += found


def _not_given(part: Mapping[str, Any], model: Sees) -> str | None:
    if part["type"] not in _IMAGES:
        return "of all but texts images alone are; leave it out"
    if not model.images:
        return "this server's model is given texts alone (--limit-mm-per-prompt of vLLM's says else); leave it out"
    if part.get("uuid") is not None or part.get("file_id") is not None:
        return "expected the image itself, got a name of one; give it as a data: URL"
    source = part.get("image_url", part.get("source"))
    url = source.get("url") if isinstance(source, Mapping) else source
    if url is not None and not model.fetches and not str(url).startswith("data:"):
        return (
            "expected the image itself, got an address, and this server fetches none; give it as a data: URL"
        )
    return None
