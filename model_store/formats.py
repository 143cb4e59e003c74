"""Converts bundles of older formats to the latest one.

    1   had neither certificates nor resampling: there are none, and the first answer is served
    2   had only q as the papers define it
    3   kept a prompt as one text, and a system prompt or null: null means that the exemplars tell;
        kept no engine options of the model: no option that changes its states was given
    4   had no two-gate rule: the papers' regions alone serve
    5   had no cascade: nothing is certified of another model's answers
    6   had no forecast of an answer's score: every answer to a known prompt is begun

The texts of format 3 can be split into turns, except where a content itself looks like turns. The bundle then covers
too few conversations, never too many: a conversation that it does not cover is not calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from candor.model_store import strict_json
from candor.model_store.errors import Difference
from candor.policy.conversation import Conversations, Turn, taken_apart
from candor.policy.policy import Policy

FIRST, LATEST = 1, 7

_TURNS = 4
"""The first format that keeps conversations as turns, and whose model identity covers all files that determine
tokens, and the engine's options."""


def manifest_as_latest(value: dict[str, Any], version: int, faults: list[Difference]) -> dict[str, Any]:
    """Converts manifest.json's object to the latest format. A field that its own format lacks is a fault."""

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
    if version < 5:
        added(value, "rule", None)
    if version < 6:
        added(value, "cascade", None)
    if version < 7 and isinstance(value.get("rule"), dict):
        rule = value["rule"] = dict(value["rule"])
        added(rule, "may_lose", None, "rule.")
        made = rule.get("certificates")
        if isinstance(made, list) and all(isinstance(one, dict) for one in made):
            rule["certificates"] = made = [dict(one) for one in made]
            for number, one in enumerate(made):
                added(one, "forecast_min", None, f"rule.certificates[{number}].")
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
        # Without turns nothing is calibrated; `with_conversations` adds them from the exemplars.
        added(
            policy,
            "conversations",
            {"system_prompt": system, "turns": [], "template_arguments": {}},
            "policy.",
        )
    return value


def exemplar_as_latest(value: Any, version: int) -> Any:
    """Converts an exemplar's object. A value that does not fit is kept, and decoding reports it."""
    if version >= _TURNS or not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return value
    rest = {name: field for name, field in value.items() if name != "prompt"}
    return rest | {"messages": list(taken_apart(value["prompt"]))}


def with_conversations(policy: Policy, version: int, prompts: Sequence[Sequence[Turn]]) -> Policy:
    """Returns the policy of a bundle of that format, with conversations taken from its exemplars."""
    if version >= _TURNS:
        return policy
    text = policy.conversations.system_prompt.text
    return replace(policy, conversations=Conversations.of_records(prompts, text))


def knows_turns(version: int) -> bool:
    """Returns whether bundles of that format hold their exemplars' conversations as the model got them."""
    return version >= _TURNS


def identifies_as_before(version: int) -> bool:
    """Returns whether bundles of that format identify their model by `engine.identity.as_before`."""
    return version < _TURNS
