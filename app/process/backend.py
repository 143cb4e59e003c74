"""The backend: an engine, its chat format and the bundle that was calibrated for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from candor.app.answering.request import certified_alphas, default_alpha
from candor.app.edge.limits import Refused
from candor.app.process.promoted import Promotions
from candor.app.process.replicas import promotions_of
from candor.engine.base import Engine, EngineError
from candor.model_store.bundle import Bundle
from candor.model_store.identity import check_identity, check_model, check_options, require_successor
from candor.model_store.signing import load_signed

if TYPE_CHECKING:
    from candor.app.process.settings import Settings
    from candor.engine.prompt import ChatFormat

logger = logging.getLogger("candor")


@dataclass(frozen=True)
class Backend:
    """An engine with its bundle. It owns the engine: the holder of the backend closes it.

    adapted: one backend per LoRA adapter, with the adapter's bundle; they share the engine and close with it.
    path: the bundle's directory; None: the configured one. shadow: directory and bundle that scores its answers too.
    promotions: what was promoted before; None: nothing was asked.
    """

    engine: Engine
    chat: ChatFormat
    bundle: Bundle
    adapted: tuple[Backend, ...] = ()
    path: Path | None = None
    shadow: tuple[Path, Bundle] | None = None
    promotions: Promotions | None = None


@dataclass(frozen=True)
class Bundles:
    """What is to be served, read before an engine starts. first, adapted, shadow: directory and bundle each."""

    promotions: Promotions
    first: tuple[Path, Bundle]
    adapted: tuple[tuple[Path, Bundle], ...] = ()
    shadow: tuple[Path, Bundle] | None = None

    @classmethod
    def read(cls, settings: Settings, adapted: Sequence[Path] = ()) -> Bundles:
        """Reads what is configured, or was promoted in its place. adapted: the adapters' bundles.

        Raises BundleError, PromotedFileError, StoreError, or Refused where a bundle lacks what the settings ask for.
        """
        promotions = promotions_of(settings)

        def served(configured: Path) -> tuple[Path, Bundle]:
            path = promotions.serving(configured)
            return path, _load(path, settings)

        first, *others = (served(path) for path in (settings.bundle, *adapted))
        read = cls(promotions, first, tuple(others))
        if settings.shadow is None:
            return read
        shadow = _load(settings.shadow, settings)
        require_successor(read.shadowed_by(shadow), shadow)
        return replace(read, shadow=(settings.shadow, shadow))

    def shadowed_by(self, shadow: Bundle) -> Bundle:
        """Returns the bundle whose answers the shadow scores too: the one of its name. Raises Refused."""
        for _, bundle in (self.first, *self.adapted):
            if bundle.manifest.name == shadow.manifest.name:
                return bundle
        names = ", ".join(bundle.manifest.name for _, bundle in (self.first, *self.adapted))
        raise Refused(
            f"CANDOR_SHADOW: expected a bundle named as one that is served ({names}), got {shadow.manifest.name}",
            "CANDOR_SHADOW",
        )


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

    read = Bundles.read(settings, [path for _, path in adapters])
    bundle = read.first[1]
    check_options(bundle, vllm or {})
    names = [*settings.model_names(bundle.manifest.name), *(one.manifest.name for _, one in read.adapted)]
    if len(set(names)) < len(names):
        raise Refused(f"each model served needs a name of its own, got {', '.join(names)}", "model")
    logger.info("starting engine=%s model=%s", settings.engine, settings.model)
    chat = ChatFormat.from_directory(settings.model)
    for _, one in (read.first, *read.adapted, *([read.shadow] if read.shadow else [])):
        chat.check(one.manifest.policy.conversations.for_template)
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
        others = []
        for (adapter, _), (path, one) in zip(adapters, read.adapted, strict=True):
            # vLLM only: other engines refuse adapters.
            adapted_engine = cast(Any, engine).with_adapter(adapter, one.manifest.representation)
            others.append(_backend(adapted_engine, chat, path, one, read))
        return replace(_backend(engine, chat, *read.first, read), adapted=tuple(others))
    except EngineError:
        await engine.close()
        raise


def _backend(engine: Engine, chat: ChatFormat, path: Path, bundle: Bundle, read: Bundles) -> Backend:
    """Raises IdentityMismatch where the bundle, or the one that shadows it, was not made for the engine's model."""
    shadow = read.shadow if read.shadow and read.shadowed_by(read.shadow[1]) is bundle else None
    for one in (bundle, *([shadow[1]] if shadow else [])):
        check_identity(engine, one)
    return Backend(engine, chat, bundle, path=path, shadow=shadow, promotions=read.promotions)


def _load(path: Path, settings: Settings) -> Bundle:
    """Loads a bundle. Raises Refused, before the slow engine start, if it lacks what the settings ask for."""
    bundle = load_signed(path, settings.bundle_key)
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
