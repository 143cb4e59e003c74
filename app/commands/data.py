"""`candor data`: looks at labelled data before a model starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from candor.app.commands.calibrate import (
    Columns,
    ContextLength,
    Json,
    VerifierName,
    reading_of,
    reporting_errors,
)

if TYPE_CHECKING:
    from candor.calibration.data import Loaded

data_app = typer.Typer(help="Data to fine-tune and calibrate on.", no_args_is_help=True)


@data_app.command("check")
def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="What is fitted on, then what only reports: JSON, CSV, Parquet, hf:NAME, ...",
            show_default=False,
        ),
    ],
    columns: Columns = "",
    verifier: VerifierName = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Target accuracies; default: 0.9, 0.95, 0.99.")
    ] = None,
    certify: Annotated[float, typer.Option(help="Accuracy that is to be certified.")] = 0.95,
    delta: Annotated[float, typer.Option(help="Chance that a certificate is false, at most.")] = 0.05,
    certify_share: Annotated[
        float, typer.Option(help="Share of the prompts set aside to certify on: 0.2 with --rule sdm.")
    ] = 0.4,
    model: Annotated[
        Path | None, typer.Option(help="Directory of the model: also count tokens, by its tokenizer alone.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    max_model_len: ContextLength = 2048,
    as_json: Json = False,
) -> None:
    """Say what was read, and whether a region and a certificate can be hoped for.

    It starts no model; each verifier is tried once. Exit code 1 where something is wrong.
    """
    from candor.calibration.certificate import Claim
    from candor.calibration.data import load
    from candor.calibration.early import try_verifiers
    from candor.calibration.inspection import check_data
    from candor.calibration.run import HELD_OUT_SHARE

    with reporting_errors(stopped="Nothing was changed."):
        alphas = tuple(sorted(set(alpha or (0.9, 0.95, 0.99))))
        try:
            reading, claim = reading_of(columns, verifier), Claim(certify, delta)
            if not all(0.5 < one < 1 for one in alphas) or not 0 < certify_share < 1:
                raise ValueError("alpha is between 0.5 and 1, and --certify-share between 0 and 1")
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        loaded = [load(file, reading) for file in files]
        found = check_data(loaded, alphas, claim, certify_share, HELD_OUT_SHARE)
        told = found.to_json()
        if model is not None:
            told["longest_prompt_tokens"] = _longest_prompt(model, loaded, max_tokens, max_model_len)
        typer.echo(json.dumps(told) if as_json else str(found))
        if model is not None and not as_json:
            typer.echo(
                f"\nthe longest prompt has {told['longest_prompt_tokens']} tokens: with {max_tokens} for the answer, "
                f"all fit the model's {max_model_len}"
            )
        for one in loaded:
            try_verifiers(one.records)
    raise typer.Exit(0 if found.fine else 1)


def _longest_prompt(model: Path, files: Sequence[Loaded], max_tokens: int, max_model_len: int) -> int:
    """Returns the tokens of the longest prompt. Raises DataError that lists records that the model cannot take."""
    from candor.calibration.generate import encode_prompts, require_calibrated
    from candor.engine.base import Representation
    from candor.engine.prompt import ChatFormat
    from candor.policy.conversation import Conversations
    from candor.policy.policy import Policy

    chat = ChatFormat.from_directory(model)
    asked = [record.messages for record in files[0].records]
    policy = Policy(max_tokens=max_tokens, conversations=Conversations.of_records(asked))
    require_calibrated(files[0].source, files[0].records, policy, chat, Representation().tag)
    return max(len(ids) for one in files for ids in encode_prompts(max_model_len, chat, one.records, policy))
