"""`candor bundle`: shows what a bundle holds, signs and verifies it. No command here starts a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from candor.model_store.bundle import Bundle
    from candor.policy.conversation import SystemPrompt

bundle_app = typer.Typer(help="Check or sign a bundle, or show what it holds.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the bundle.")]


@bundle_app.command()
def verify(
    directory: Directory,
    key: Annotated[
        Path | None,
        typer.Option(help="Public key in PEM format; the bundle must be signed with its private one."),
    ] = None,
) -> None:
    """Check every byte of a bundle, that its parts fit together, and its signature where a key is given. Exit code 1
    if anything is wrong."""
    bundle = _load(directory, key)
    signed = f", signed with {key}" if key else ""
    typer.echo(f"{directory}: whole, {len(bundle.exemplars)} exemplars, digest {bundle.digest}{signed}")


@bundle_app.command("sign")
def sign_bundle(
    directory: Directory,
    key: Annotated[Path, typer.Option(help="Private elliptic-curve key in PEM format.")],
) -> None:
    """Sign a bundle: writes DIR.sig beside it. A key's password is taken from CANDOR_SIGNING_PASSWORD."""
    from candor.model_store.errors import BundleError
    from candor.model_store.signing import sign

    try:
        signature = sign(directory, key, os.environ.get("CANDOR_SIGNING_PASSWORD"))
    except (BundleError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"signed: {signature}")


@bundle_app.command()
def show(directory: Directory) -> None:
    """Print what a bundle was made for, how, and at which alphas it has a region."""
    typer.echo("\n".join(_describe(_load(directory))))


def _load(directory: Path, key: Path | None = None) -> Bundle:
    from candor.model_store.errors import BundleError
    from candor.model_store.signing import load_signed

    try:
        return load_signed(directory, key)
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
        **_lineage(manifest.provenance.get("lineage")),
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
        if rule.may_lose is not None:
            rows["not begun"] = (
                f"answers to prompts that promise too low a score; of those let through at most {rule.may_lose:.1%} "
                f"are to be lost, with confidence {rule.confidence:g}"
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


def _lineage(found: Any) -> dict[str, str]:
    """Returns where a recalibrated bundle comes from."""
    if not isinstance(found, dict):
        return {}
    return {
        "follows": f"{str(found.get('parent'))[:12]}, by {found.get('audits')} audits of answers given from "
        f"{found.get('from')} to {found.get('until')}"
    }


def _system_prompt(calibrated: SystemPrompt) -> str:
    match calibrated.kind:
        case "none":
            return "none"
        case "fixed":
            return repr(calibrated.text)
        case "records":
            count = len(calibrated.digests)
            return f"{count} of the records' own" + (", or none" if calibrated.optional else "")
