"""`candor evaluate`: measures a bundle on records that it was not made from, alone or beside other methods.

Files are read and checked before the engine starts. Progress goes to standard error and results go to standard
output, so that `--json` gives one JSON object alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from candor.app.commands.calibrate import (
    Adapter,
    AskPerson,
    Cache,
    Columns,
    Concurrency,
    ContextLength,
    Eager,
    Json,
    Kind,
    KindColumn,
    Model,
    Page,
    Relabel,
    Seed,
    VerifierName,
    beside,
    reading_of,
    reporting_errors,
    require_kind,
    results_alone_on_stdout,
    tell_what_was_read,
    write_page,
)
from candor.app.commands.serve import EngineKind, vllm_options
from candor.app.process.ending import ending_children

if TYPE_CHECKING:
    from candor.calibration.answering import AnsweringOptions, DataFile
    from candor.calibration.generate import Labelled
    from candor.comparison.run import CompareSettings, ComparisonData
    from candor.engine.base import Engine
    from candor.engine.settings import EngineSettings
    from candor.model_store.bundle import Bundle


def evaluate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")],
    model: Model,
    data: Annotated[Path, typer.Option(help="Labelled records that the bundle was not made from.")],
    shifted: Annotated[
        Path | None, typer.Option(help="Records of a related kind, such as longer ones.")
    ] = None,
    ood: Annotated[Path | None, typer.Option(help="Records of another kind altogether.")] = None,
    near: Annotated[
        Path | None,
        typer.Option(help="Records that look like the task's but are not, such as a changed instruction."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Other methods to stand beside the bundle: all, or names by commas."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="With --compare: the records that the bundle was made from; others learn from them."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="With --compare: folder of the report; default: beside the bundle."),
    ] = None,
    page: Page = None,
    kind: KindColumn = None,
    ensemble: Annotated[int, typer.Option(min=2, help="With --compare: layers of the ensemble.")] = 3,
    asked: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --compare: records of each file that methods which ask the model again are tried on; 0: none.",
        ),
    ] = 200,
    columns: Columns = "",
    verifier: VerifierName = None,
    relabel: Relabel = False,
    ask_person: AskPerson = False,
    seed: Seed = 0,
    adapter: Adapter = None,
    engine: Kind = EngineKind.vllm,
    max_model_len: ContextLength = 2048,
    eager: Eager = False,
    concurrency: Concurrency = 64,
    hidden_cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Answer labelled records by the bundle's policy; report what it admits and how right that is.

    With --compare, other methods judge the same answers from the same hidden states, and a report is written. vLLM's
    options are taken by their own names (docs/settings.md).
    """
    vllm = vllm_options(context, engine.value)  # first, so that a wrong option is refused at once
    from candor.calibration.answering import AnsweringOptions, DataFile, require_unseen
    from candor.calibration.early import require_writable, try_verifiers
    from candor.calibration.run import evaluate_sets
    from candor.engine.prompt import ChatFormat
    from candor.engine.settings import EngineSettings
    from candor.model_store.bundle import load_bundle
    from candor.model_store.identity import check_options

    with reporting_errors(), ending_children(143), results_alone_on_stdout():
        settings = _compare_settings(compare, calibration, ensemble, asked, seed)
        loaded = load_bundle(bundle)
        check_options(loaded, vllm)
        try:
            reading = reading_of(columns, verifier)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        paths = {"test": data, "shifted": shifted, "ood": ood, "near": near}
        decides = loaded.policy.conversations.decides
        if decides and settings:
            raise typer.BadParameter("--compare knows no decisions: leave it out")
        chat = ChatFormat.from_directory(model)
        sets = {
            name: DataFile.load_decisions(path, chat) if decides else DataFile.load(path, reading)
            for name, path in paths.items()
            if path is not None
        }
        for file in sets.values():
            tell_what_was_read(file)
            require_unseen(loaded, file)
        require_kind(kind, sets["test"])
        fitted = DataFile.load(calibration, reading) if settings and calibration else None
        engine_settings = EngineSettings(
            model=model,
            kind=engine.value,
            representation=loaded.manifest.representation,
            dtype=loaded.manifest.model.dtype,  # type: ignore[arg-type]  # the engine refuses any other
            max_model_len=max_model_len,
            eager=eager,
            vllm=vllm,
        )
        asking = AnsweringOptions(
            hidden_cache or beside(bundle),
            concurrency,
            seed,
            relabel,
            ask_person,
            prompt_states=loaded.rule is not None,
        )
        require_writable(asking.cache, "the cache")
        for file in sets.values():
            try_verifiers(file.records, asking.cache)
        if page is not None:
            require_writable(page.parent, "the page's folder")
        answers, material = asyncio.run(
            _ask(loaded, adapter, engine_settings, sets, fitted, settings, asking)
        )
        evaluations = evaluate_sets(loaded, answers, seed)
        if page is not None:
            held_out = answers.pop("test")
            write_page(page, loaded, held_out, sets["test"].records, answers, kind)
        figures = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
        told: dict[str, Any] = {"bundle": str(bundle), "digest": loaded.digest, "sets": figures}
        if settings and material:
            more, tables = _compare(loaded, material, settings, report or beside(bundle, ".comparison"))
            told |= more
    if as_json:
        typer.echo(json.dumps(told))
    elif settings:
        typer.echo(tables)
    else:
        from candor.calibration.report import table

        typer.echo(table(evaluations))


def _compare_settings(
    compare: str | None, calibration: Path | None, ensemble: int, asked: int, seed: int
) -> CompareSettings | None:
    """Returns the comparison's settings; None without --compare."""
    if compare is None:
        return None
    try:
        from candor.comparison.comparators import COMPARATORS, SAMPLERS
        from candor.comparison.run import CompareSettings
    except ImportError as error:
        raise typer.BadParameter(f"--compare needs what candor[compare] installs: {error}") from error
    if calibration is None:
        raise typer.BadParameter("--compare needs --calibration: the records that the bundle was made from")
    names = tuple(part.strip() for part in compare.split(",") if part.strip())
    try:
        return CompareSettings(
            (*COMPARATORS, *SAMPLERS) if names == ("all",) else names, ensemble, asked, seed
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


async def _ask(
    bundle: Bundle,
    adapter: Path | None,
    engine_settings: EngineSettings,
    sets: Mapping[str, DataFile],
    fitted: DataFile | None,
    settings: CompareSettings | None,
    asking: AnsweringOptions,
) -> tuple[dict[str, list[Labelled]], ComparisonData | None]:
    """Answers all records, then closes the engine, since comparators need its memory and cores."""
    from candor.calibration.answering import answer_sets
    from candor.calibration.kept import asked
    from candor.engine.prompt import ChatFormat
    from candor.model_store.identity import check_identity

    chat = ChatFormat.from_directory(engine_settings.model)

    async def ask(engine: Engine) -> tuple[dict[str, list[Labelled]], ComparisonData | None]:
        material = None
        if (
            settings is not None and fitted is not None
        ):  # first: it may find that these are not the bundle's answers
            from candor.comparison.run import gather

            material = await gather(engine, chat, bundle, fitted, sets, settings, asking)
        return await answer_sets(engine, chat, bundle, sets, asking), material

    return await asked(engine_settings, chat, adapter, ask, lambda engine: check_identity(engine, bundle))


def _compare(
    bundle: Bundle, material: ComparisonData, settings: CompareSettings, folder: Path
) -> tuple[dict[str, Any], str]:
    """Writes the report. Returns the comparison's part of the JSON, and its tables."""
    from candor.comparison.run import run_comparison, write
    from candor.comparison.tables import as_text, cost_table, heading, tables

    comparison = run_comparison(material, settings)
    written = write(bundle, comparison, folder)
    shown = []
    for name, one in comparison.sets.items():
        shown += [heading(name, one), *(as_text(table) for table in tables(comparison, name, one))]
    for name, one in comparison.sampled.items():
        several = (cost_table(name, one), *tables(comparison, name, one))
        shown += [f"{heading(name, one)}, also by methods that ask again", *map(as_text, several)]
    shown.append("Intervals and figures: " + ", ".join(str(path) for path in written))
    told = {"comparison": comparison.to_json(), "report": [str(path) for path in written]}
    return told, "\n\n".join(shown)
