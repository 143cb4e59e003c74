"""Bundles of older formats, read as what they say today.

    1   knew neither certificates nor resampling: it has none, and the first answer is served
    2   knew q as the papers define it alone
    3   kept a prompt as one text, and a system prompt or null: null means what its exemplars say;
        of a model no engine's options: none that change its states were given

The texts of format 3 can be taken apart into turns but for contents that look like turns themselves. What they say of
the calibrated conversations is then too little, never too much: a conversation that is none of them is not
calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from candor.model_store import strict_json
from candor.model_store.errors import Difference
from candor.policy.conversation import Conversations, Turn, taken_apart
from candor.policy.policy import Policy

FIRST, LATEST = 1, 4

_TURNS = 4
"""The first format that keeps conversations as turns, and a model's identity over all files that make tokens and
the engine's options."""


def manifest_as_latest(value: dict[str, Any], version: int, faults: list[Difference]) -> dict[str, Any]:
    """manifest.json's object with the fields of the latest format; a field that its own lacks is a fault."""

    def added(where: dict[str, Any], name: str, meaning: Any, prefix: str = "") -> None:
        if name in where:
            faults.append(Difference(prefix + name, "no such field", strict_json.show(where[name])))
        where[name] = meaning

    value = dict(value)
    policy = value.get("policy")
    if isinstance(policy, dict):
        policy = value["policy"] = dict(policy)
    if version < 2:
        added(value, "certificates", [])
        if isinstance(policy, dict):
            added(policy, "resample", 1, "policy.")
    if version < 3:
        added(value, "passed_over", 0)
    if version < _TURNS and isinstance(value.get("model"), dict):
        value["model"] = dict(value["model"])
        added(value["model"], "engine_options", {}, "model.")
    if version < _TURNS and isinstance(policy, dict):
        if "system_prompt" not in policy:
            faults.append(Difference("policy.system_prompt", "a string or null", "nothing"))
        text = strict_json.decode(
            str | None, policy.pop("system_prompt", None), "policy.system_prompt", faults
        )
        system = {
            "kind": "none" if text is None else "fixed",
            "text": text,
            "digests": [],
            "optional": False,
        }
        # No turns: until the exemplars have told (`with_conversations`), nothing is calibrated.
        added(
            policy,
            "conversations",
            {"system_prompt": system, "turns": [], "template_arguments": {}},
            "policy.",
        )
    return value


def exemplar_as_latest(value: Any, version: int) -> Any:
    """An exemplar's object; what does not fit stays, and is found when it is decoded."""
    if version >= _TURNS or not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return value
    rest = {name: field for name, field in value.items() if name != "prompt"}
    return rest | {"messages": list(taken_apart(value["prompt"]))}


def with_conversations(policy: Policy, version: int, prompts: Sequence[Sequence[Turn]]) -> Policy:
    """The policy of a bundle of that format, with the conversations that its exemplars tell of."""
    if version >= _TURNS:
        return policy
    text = policy.conversations.system_prompt.text
    return replace(policy, conversations=Conversations.of_records(prompts, text))


def knows_turns(version: int) -> bool:
    """Whether a bundle of that format holds its exemplars' conversations as they were put to the model."""
    return version >= _TURNS


def identifies_as_before(version: int) -> bool:
    """Whether a bundle of that format knows its model by `engine.identity.as_before`."""
    return version < _TURNS
