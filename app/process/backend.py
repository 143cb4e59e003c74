"""The backend: an engine, its chat format and the bundle that was calibrated for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from candor.app.answering.request import certified_alphas, default_alpha
from candor.app.edge.limits import Refused
from candor.engine.base import Engine, EngineError
from candor.model_store.bundle import Bundle, load_bundle
from candor.model_store.identity import check_identity, check_model, check_options

if TYPE_CHECKING:
    from candor.app.process.settings import Settings
    from candor.engine.prompt import ChatFormat

logger = logging.getLogger("candor")


@dataclass(frozen=True)
class Backend:
    """An engine with its bundle. It owns the engine: the holder of the backend closes it.

    adapted: one backend per LoRA adapter, with the adapter's bundle; they share the engine and close with it.
    """

    engine: Engine
    chat: ChatFormat
    bundle: Bundle
    adapted: tuple[Backend, ...] = ()


async def start_backend(
    settings: Settings, adapters: Sequence[tuple[Path, Path]] = (), vllm: Mapping[str, Any] | None = None
) -> Backend:
    """Loads the bundle, starts the engine, and checks that it is the one that the bundle was made for.

    adapters: pairs of a LoRA adapter's directory and its bundle's directory. vllm: `EngineSettings.vllm`.
    Raises BundleError, Refused, EngineError or IdentityMismatch; it leaves nothing running then.
    """
    from candor.engine.factory import start_engine
    from candor.engine.prompt import ChatFormat
    from candor.engine.settings import EngineSettings

    bundle = _load(settings.bundle, settings)
    check_options(bundle, vllm or {})
    adapted = [(adapter, _load(path, settings)) for adapter, path in adapters]
    names = [*settings.model_names(bundle.manifest.name), *(one.manifest.name for _, one in adapted)]
    if len(set(names)) < len(names):
        raise Refused(f"each model served needs a name of its own, got {', '.join(names)}", "model")
    logger.info("starting engine=%s model=%s", settings.engine, settings.model)
    chat = ChatFormat.from_directory(settings.model)
    for one in (bundle, *(other for _, other in adapted)):
        chat.check(one.manifest.policy.conversations.template_arguments)
        check_model(one, settings.model, chat, settings.max_model_len, vllm or {})
    engine = await start_engine(
        EngineSettings(
            model=settings.model,
            kind=settings.engine,
            representation=bundle.manifest.representation,
            dtype=cast(Any, bundle.manifest.model.dtype),  # the engine refuses an unknown one
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_cache_bytes=settings.kv_cache_bytes,
            eager=settings.eager,
            vllm=vllm or {},
            served_model_name=names[0],
            adapters=tuple(adapter for adapter, _ in adapters),
        ),
        chat,
    )
    try:
        check_identity(engine, bundle)
        others = []
        for adapter, one in adapted:
            # vLLM only: other engines refuse adapters.
            adapted_engine = cast(Any, engine).with_adapter(adapter, one.manifest.representation)
            check_identity(adapted_engine, one)
            others.append(Backend(adapted_engine, chat, one))
    except EngineError:
        await engine.close()
        raise
    return Backend(engine, chat, bundle, tuple(others))


def _load(path: Path, settings: Settings) -> Bundle:
    """Loads a bundle. Raises Refused, before the slow engine start, if it lacks what the settings ask for."""
    bundle = load_bundle(path)
    default_alpha(settings.alpha, bundle.manifest.alphas)
    certified_alphas(bundle, settings)
    alphas = ",".join(map(str, bundle.manifest.alphas))
    logger.info("bundle name=%s digest=%s alphas=%s", bundle.manifest.name, bundle.digest, alphas)
    if min(bundle.report.get("reference_abstention_ratio", {}).values(), default=0) == 1:
        logger.warning(
            "bundle %s answered none of its held-out prompts at any alpha: expect every answer to be abstained from. "
            "Its report.json says what may help (advice); then calibrate again",
            bundle.manifest.name,
        )
    return bundle
