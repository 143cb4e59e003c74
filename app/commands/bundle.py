"""`candor bundle`: shows what a bundle holds, and verifies it. Neither command starts a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from candor.model_store.bundle import Bundle
    from candor.policy.conversation import SystemPrompt

bundle_app = typer.Typer(help="Check a bundle, or show what it holds.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the bundle.")]


@bundle_app.command()
def verify(directory: Directory) -> None:
    """Check every byte of a bundle, and that its parts fit together. Exit code 1 if they don't."""
    bundle = _load(directory)
    typer.echo(f"{directory}: whole, {len(bundle.exemplars)} exemplars, digest {bundle.digest}")


@bundle_app.command()
def show(directory: Directory) -> None:
    """Print what a bundle was made for, how, and at which alphas it has a region."""
    typer.echo("\n".join(_describe(_load(directory))))


def _load(directory: Path) -> Bundle:
    from candor.model_store.bundle import load_bundle
    from candor.model_store.errors import BundleError

    try:
        return load_bundle(directory)
    except BundleError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _describe(bundle: Bundle) -> list[str]:
    manifest, estimator = bundle.manifest, bundle.estimator
    model, policy, support = manifest.model, manifest.policy, estimator.support
    representation = manifest.representation
    sizes = representation.block_sizes(model.hidden_size)
    blocks = " + ".join(f"{part} {size}" for part, size in zip(representation.order, sizes, strict=True))
    adapter = manifest.adapter
    classes = [f"{c} = {name}" for c, name in enumerate(manifest.class_names)]
    counts = [f"{name} {int((support.labels == c).sum())}" for c, name in enumerate(manifest.class_names)]
    rows = {
        "name": manifest.name,
        "digest": bundle.digest,
        "created": manifest.created,
        "model": f"{model.name}, {model.architecture}, {model.dtype}, weights {model.weights_sha256[:12]}",
        "adapter": f"{adapter.name}, {adapter.sha256[:12]}" if adapter else "none",
        "representation": f"{blocks} = {sum(sizes)}, at the last token of {representation.tag}",
        "evidence": ", ".join(representation.evidence) or "none",
        "policy": f"temperature {policy.temperature:g}, top_p {policy.top_p:g}, top_k {policy.top_k}, "
        f"max_tokens {policy.max_tokens}"
        + (f", up to {policy.resample} answers until one is reliable" if policy.resample > 1 else ""),
        "system prompt": _system_prompt(policy.conversations.system_prompt),
        "turns": ", ".join(policy.conversations.turns) or "none known",
        "classes": ", ".join(classes),
        "support": f"{len(support)} rows of {support.h_prime.shape[1]}: {', '.join(counts)}",
        "calibration": f"{len(estimator.calibration.labels)} rows",
    }
    for alpha, region in estimator.regions.items():
        thresholds = ", ".join(f"{value:.3f}" for value in region.psi.tolist())
        rows[f"region at {alpha:g}"] = (
            f"rescaled similarity from {region.q_prime_min:.1f}, class thresholds {thresholds}"
            if region.found
            else "none found: nothing is admitted"
        )
    if (rule := manifest.rule) is not None:
        rows["two gates"] = (
            f"refuse at most {rule.refused_at_most:.1%} of prompts of the kind calibrated on, with confidence "
            f"{rule.confidence:g}; score: {rule.score}"
        )
        for certified in rule.certificates:
            rows[f"answers at {certified.alpha:g}"] = (
                f"accuracy {certified.accuracy:g} with confidence {certified.confidence:g}, scores from "
                f"{certified.score_min:.2f}: {certified.right} of {certified.answered} answered were right, of "
                f"{certified.records} records"
            )
        if missing := [alpha for alpha in manifest.alphas if rule.at(alpha) is None]:
            rows["answers nothing"] = f"at {', '.join(map(str, missing))}: nothing could be certified"
    for one in manifest.certificates:
        rows[f"certified at {one.alpha:g}, {one.estimator}"] = (
            f"accuracy {one.accuracy:g} with confidence {one.confidence:g}, rescaled similarity from "
            f"{one.rescaled_similarity_min:.1f}: {one.right} of {one.answered} answered were right"
        )
    return [f"{label + ':':<16} {text}" for label, text in rows.items()]


def _system_prompt(calibrated: SystemPrompt) -> str:
    match calibrated.kind:
        case "none":
            return "none"
        case "fixed":
            return repr(calibrated.text)
        case "records":
            count = len(calibrated.digests)
            return f"{count} of the records' own" + (", or none" if calibrated.optional else "")
