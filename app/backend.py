"""What answers and what judges the answers: an engine, its chat format and the bundle made for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from app.desk import certified_alphas, default_alpha
from engine.base import Engine, IdentityMismatch
from engine.identity import differences
from model_store.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    from app.settings import Settings
    from engine.prompt import ChatFormat

logger = logging.getLogger("candor")


@dataclass(frozen=True)
class Backend:
    """Owns the engine: whoever holds it closes it."""

    engine: Engine
    chat: ChatFormat
    bundle: Bundle


async def start_backend(settings: Settings) -> Backend:
    """Loads the bundle, starts the engine that it was made for, and checks that it is the same.

    Raises BundleError, Refused, EngineError or IdentityMismatch; nothing is left running then.
    """
    from engine.factory import EngineSettings, start_engine
    from engine.prompt import ChatFormat

    bundle = load_bundle(settings.bundle)
    default_alpha(settings.alpha, bundle.manifest.alphas)  # refused before the engine takes its time
    certified_alphas(bundle.manifest, settings)  # so is this
    alphas = ",".join(map(str, bundle.manifest.alphas))
    logger.info("bundle name=%s digest=%s alphas=%s", bundle.manifest.name, bundle.digest, alphas)
    logger.info("starting engine=%s model=%s", settings.engine, settings.model)
    chat = ChatFormat.from_directory(settings.model)
    engine = await start_engine(
        EngineSettings(
            model=settings.model,
            kind=settings.engine,
            representation=bundle.manifest.representation,
            dtype=cast(Any, bundle.manifest.model.dtype),  # an unknown one, the engine refuses
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_cache_bytes=settings.kv_cache_bytes,
            eager=settings.eager,
            served_model_name=settings.served_model_name or bundle.manifest.name,
        ),
        chat,
    )
    try:
        check_identity(engine, bundle)
    except IdentityMismatch:
        await engine.close()
        raise
    return Backend(engine, chat, bundle)


def check_identity(engine: Engine, bundle: Bundle) -> None:
    """Raises IdentityMismatch that lists every difference between what is served and what was calibrated."""
    found = differences(bundle.manifest.model, engine.identity)
    if engine.representation != bundle.manifest.representation:
        found.append(
            f"representation: the bundle was made for {bundle.manifest.representation.to_json()}, "
            f"this engine gives {engine.representation.to_json()}"
        )
    if bundle.manifest.adapter is not None:
        found.append(
            f"adapter: the bundle was made for {bundle.manifest.adapter.name}, this engine lays none over"
        )
    width = sum(engine.representation.block_sizes(engine.identity.hidden_size))
    if width != bundle.estimator.adaptor.input_dim:
        found.append(
            f"size of h: the bundle's estimator takes {bundle.estimator.adaptor.input_dim} numbers, "
            f"this engine gives {width}"
        )
    if found:
        raise IdentityMismatch(
            f"bundle {bundle.manifest.name!r} was not made for this model:\n  "
            + "\n  ".join(found)
            + "\nServe the model it was made for, or make a bundle for this one with `candor calibrate`."
        )
