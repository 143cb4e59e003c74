"""Compares a bundle with the model that an engine serves, and names every difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from candor.engine.base import AdapterIdentity, Engine, IdentityMismatch, ModelIdentity
from candor.engine.identity import as_before, differences, identify
from candor.engine.prompt import ChatFormat
from candor.engine.vllm_options import GRAMMARS, changing_h
from candor.model_store.bundle import Bundle
from candor.model_store.errors import BundleError, Difference
from candor.model_store.formats import identifies_as_before


def check_identity(engine: Engine, bundle: Bundle) -> None:
    """Raises IdentityMismatch, which lists every difference between the served and the calibrated model."""
    earlier = identifies_as_before(bundle.manifest.format_version)
    found = _differences(bundle, engine.earlier_identity if earlier else engine.identity)
    if engine.representation != bundle.manifest.representation:
        found.append(
            f"representation: the bundle was made for {bundle.manifest.representation.to_json()}, "
            f"this engine gives {engine.representation.to_json()}"
        )
    wanted, laid = bundle.manifest.adapter, engine.adapter
    if (wanted and wanted.sha256) != (laid and laid.sha256):  # the name is not compared
        found.append(
            f"adapter: the bundle was made for {_shown(wanted)}, this engine lays {_shown(laid)} over"
        )
    width = sum(engine.representation.block_sizes(engine.identity.hidden_size))
    if width != bundle.estimator.adaptor.input_dim:
        found.append(
            f"size of h: the bundle's estimator takes {bundle.estimator.adaptor.input_dim} numbers, "
            f"this engine gives {width}"
        )
    if found:
        raise _mismatch(bundle, found)


def check_options(bundle: Bundle, vllm: Mapping[str, Any]) -> None:
    """Checks vLLM's options alone, before an engine starts with them. Raises IdentityMismatch."""
    made_for = bundle.manifest.model
    if found := _differences(bundle, replace(made_for, engine_options=changing_h(vllm))):
        raise _mismatch(bundle, found)


def check_model(
    bundle: Bundle, model: Path, chat: ChatFormat, max_model_len: int, vllm: Mapping[str, Any]
) -> None:
    """Checks the model's files, before an engine starts with them. Raises EngineError or IdentityMismatch."""
    made_for = bundle.manifest.model
    identity = identify(model, chat, made_for.dtype, max_model_len, changing_h(vllm))
    if identifies_as_before(bundle.manifest.format_version):
        identity = as_before(identity, model)
    if found := _differences(bundle, identity):
        raise _mismatch(bundle, found)


def _differences(bundle: Bundle, actual: ModelIdentity) -> list[str]:
    """What grammars let through matters where the bundle's answers are held to one."""
    both = bundle.manifest.model, actual
    if bundle.manifest.policy.conversations.grammar is None:
        both = _without(both[0], GRAMMARS), _without(both[1], GRAMMARS)
    return differences(*both)


def _without(identity: ModelIdentity, option: str) -> ModelIdentity:
    options = {name: value for name, value in identity.engine_options.items() if name != option}
    return replace(identity, engine_options=options)


def require_successor(old: Bundle, new: Bundle) -> None:
    """Raises BundleError unless `new` can take the place of `old` under the same requests.

    It must have the same policy, and judge by the same kind of rule at the same alphas or more. Whether it was made
    for the model, `check_identity` says.
    """
    one, other = old.manifest, new.manifest
    rules = ["two gates" if bundle.rule else "regions alone" for bundle in (old, new)]
    pairs: dict[str, tuple[object, object]] = {
        "name": (one.name, other.name),
        "policy": (one.policy, other.policy),
        "class_names": (one.class_names, other.class_names),
        "rule": (rules[0], rules[1]),
    }
    found = [
        Difference(where, str(expected), str(actual))
        for where, (expected, actual) in pairs.items()
        if expected != actual
    ]
    if missing := sorted(set(one.alphas) - set(other.alphas)):
        found.append(Difference("alphas", f"{list(one.alphas)} among them", f"none at {missing}"))
    if found:
        raise BundleError(
            f"the bundle {new.digest[:12]} cannot follow {old.digest[:12]} in a running server",
            found,
            "Restart the server with it as the configured bundle.",
        )


def _mismatch(bundle: Bundle, found: list[str]) -> IdentityMismatch:
    return IdentityMismatch(
        f"bundle {bundle.manifest.name!r} was not made for this model:\n  "
        + "\n  ".join(found)
        + "\nServe the model it was made for, as it was then, or make a bundle for this one with `candor calibrate`."
    )


def _shown(adapter: AdapterIdentity | None) -> str:
    return "none" if adapter is None else f"{adapter.name} ({adapter.sha256[:12]})"
