"""`candor data`: looks at labelled data before a model starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from candor.app.commands.calibrate import Columns, Json, VerifierName, reading_of, reporting_errors

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
    certify_share: Annotated[float, typer.Option(help="Share of the prompts set aside to certify on.")] = 0.2,
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
        typer.echo(json.dumps(found.to_json()) if as_json else str(found))
        for one in loaded:
            try_verifiers(one.records)
    raise typer.Exit(0 if found.fine else 1)
