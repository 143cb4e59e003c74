"""`candor calibrate`: makes a bundle from labelled data. `candor evaluate` shares its options and its error handling.

Files are read, and all that can fail is tried, before the engine starts. Progress goes to standard error and results
go to standard output, so that `--json` gives one JSON object alone, whatever the engine prints.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from candor.app.commands.serve import EngineKind, vllm_options
from candor.app.process.ending import ending_children

if TYPE_CHECKING:
    from candor.calibration.agreement import Agreement
    from candor.calibration.answering import AnsweringOptions, Answers, DataFile, Inputs
    from candor.calibration.data import Record
    from candor.calibration.generate import Labelled
    from candor.calibration.shapes import Reading
    from candor.engine.base import Engine
    from candor.engine.prompt import ChatFormat
    from candor.engine.settings import EngineSettings
    from candor.model_store.bundle import Bundle
    from candor.policy.policy import Policy
    from candor.policy.upstream import Upstream


class Rule(StrEnum):
    two_gates = "two-gates"
    sdm = "sdm"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[Path, typer.Option(help="Directory of the model: config.json, safetensors, tokenizer.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Directory of a LoRA adapter to lay over the model, as PEFT writes it.")
]
Kind = Annotated[EngineKind, typer.Option("--engine", help="What generates.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Records in flight at once.")]
ContextLength = Annotated[
    int, typer.Option(min=1, help="Longest sequence in tokens: prompt, answer and tag.")
]
Eager = Annotated[bool, typer.Option("--eager", help="No compilation: starts sooner, runs slower.")]
Seed = Annotated[int, typer.Option(min=0, help="Of splits, weights, sampling and the bootstrap.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder where finished answers are kept for the next run; default: beside the bundle."),
]
Json = Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")]
Page = Annotated[
    Path | None,
    typer.Option(
        help="Where the report for people is written, one HTML file; default of calibrate: OUT.html."
    ),
]
KindColumn = Annotated[
    str | None,
    typer.Option(help="Column of the data that tells kinds of prompts apart in the report; default: length."),
]
Columns = Annotated[
    str,
    typer.Option(help='Columns of the data by field, such as "prompt=question, reference=answer".'),
]
VerifierName = Annotated[
    str | None,
    typer.Option(
        help="How answers are judged where a record does not say: exact, number(1%), judge(FILE), ..."
    ),
]
Relabel = Annotated[bool, typer.Option("--relabel", help="Ask verifiers again whose verdicts are kept.")]
AskPerson = Annotated[
    bool, typer.Option("--ask-person", help="Ask here, at the terminal, about answers of unknown label.")
]


def calibrate(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path, typer.Option(help="Labelled records: JSON, CSV, Parquet, hf:NAME, ... (docs/your-data.md).")
    ],
    out: Annotated[Path, typer.Option(help="Where the bundle is published; must not exist yet.")],
    alpha: Annotated[
        list[float], typer.Option(help="Target accuracy, between 0.5 and 1; may be given several times.")
    ],
    test: Annotated[
        list[Path] | None,
        typer.Option(
            help="Held-out records that only report; default: a fifth of the data. May be repeated."
        ),
    ] = None,
    decisions: Annotated[
        bool, typer.Option("--decisions", help="The records are labelled questions, for POST /v1/decisions.")
    ] = False,
    rule: Annotated[
        Rule,
        typer.Option(help="What lets answers through: two certified gates, or the papers' region alone."),
    ] = Rule.two_gates,
    certify: Annotated[
        float | None,
        typer.Option(
            help="Accuracy to certify among the answered, at least; e.g. 0.95. Two gates certify alpha without it."
        ),
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that a certificate is false, at most.")] = 0.05,
    certify_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the prompts set aside to certify on; default: 0.4 for two gates, else 0.2."
        ),
    ] = None,
    certify_data: Annotated[
        Path | None, typer.Option(help="Records to certify on, in place of a share of the data.")
    ] = None,
    refuse: Annotated[
        float, typer.Option(help="Share of prompts of the calibrated kind that the first gate may refuse.")
    ] = 0.02,
    strangers: Annotated[
        Path | None,
        typer.Option(help="Prompts to refuse that look like the task's, such as a changed instruction."),
    ] = None,
    may_lose: Annotated[
        float | None,
        typer.Option(
            help="Begin no answer that will hardly be let through; this share of those let through may be lost, e.g. "
            "0.02. Default: all are begun."
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Score of the second gate, by its name in the report; default: the best."),
    ] = None,
    escalate_to: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible API, up to /v1, that answers what the gates withhold: certifies both as one."
        ),
    ] = None,
    escalate_model: Annotated[
        str | None, typer.Option(help="Name of the model that is asked there; the server's must be the same.")
    ] = None,
    escalate_key_file: Annotated[Path | None, typer.Option(help="File with its API key.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: that of its folder.")] = None,
    represent: Annotated[
        str, typer.Option(help="What is judged: mean, last, evidence, by commas; the papers' is mean,last.")
    ] = "mean,last,evidence",
    evidence: Annotated[
        str | None, typer.Option(help="Names from engine.base.EVIDENCE, by commas; default: all of them.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer; longer ones are not calibrated.")
    ] = 128,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="Leads every conversation, also when served; default: what the records bring, or none."
        ),
    ] = None,
    template_arguments: Annotated[
        str,
        typer.Option(
            help='Arguments of the chat template as JSON, e.g. {"enable_thinking": false}; "tools" and '
            '"structured_outputs" too.'
        ),
    ] = "{}",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: greedy.")] = 0.0,
    resample: Annotated[
        int,
        typer.Option(min=1, help="Most answers to a prompt, until one is reliable; above 1: sampled ones."),
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Layers trained on new halves; the best is kept.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each round.")] = 200,
    exemplar_dim: Annotated[int, typer.Option(min=1, help="M, the size of an exemplar vector.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-5,
    pass_over: Annotated[
        int, typer.Option(min=0, help="Invalid neighbours that do not end q yet; the papers': 0.")
    ] = 0,
    columns: Columns = "",
    verifier: VerifierName = None,
    human: Annotated[
        Path | None,
        typer.Option(
            help="Answers labelled by people: the verifier is held to them, and so are certificates."
        ),
    ] = None,
    relabel: Relabel = False,
    ask_person: AskPerson = False,
    review: Annotated[
        Path | None,
        typer.Option(
            help="An earlier bundle of these data: look at its suspects here, and mend their labels."
        ),
    ] = None,
    page: Page = None,
    kind: KindColumn = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    engine: Kind = EngineKind.vllm,
    dtype: Annotated[Dtype, typer.Option(help="What the weights are served in.")] = Dtype.bfloat16,
    max_model_len: ContextLength = 2048,
    eager: Eager = False,
    concurrency: Concurrency = 64,
    hidden_cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Make a bundle for a model from labelled data, and report how it does on held-out records.

    A run that was stopped goes on from its cache when the same command is given again. vLLM's options are taken by
    their own names (docs/settings.md).
    """
    vllm = vllm_options(context, engine.value)  # first, so that a wrong option is refused at once
    from candor.calibration import certificate
    from candor.calibration.answering import AnsweringOptions, Inputs
    from candor.calibration.base_rates import base_rate_table
    from candor.calibration.cascade import Escalating, require_judged, try_upstream
    from candor.calibration.early import certificate_hope
    from candor.calibration.fit import FitSettings
    from candor.calibration.report import table
    from candor.calibration.rule_settings import RuleSettings
    from candor.calibration.run import Certifying, make_bundle, require_free, require_possible
    from candor.engine.base import EVIDENCE, Representation
    from candor.engine.identity import hidden_size_of
    from candor.engine.prompt import ChatFormat
    from candor.engine.settings import EngineSettings
    from candor.model_store.bundle import load_bundle
    from candor.policy.conversation import Conversations
    from candor.policy.decisions import EVIDENCE as DECISION_EVIDENCE
    from candor.policy.policy import Policy

    with reporting_errors(), ending_children(143), results_alone_on_stdout():
        try:
            parts = _by_commas(represent)
            unnamed = () if "evidence" not in parts else DECISION_EVIDENCE if decisions else EVIDENCE
            names = unnamed if evidence is None else _by_commas(evidence)
            representation = Representation(order=parts, evidence=names)  # type: ignore[arg-type]
            settings = FitSettings(
                tuple(sorted(set(alpha))), rounds, epochs, exemplar_dim, learning_rate, seed, pass_over
            )
            gates = None
            if rule is Rule.two_gates:
                gates = RuleSettings(refuse, delta, seed=seed, score=score, may_lose=may_lose)
            if certify_data is not None and certify is None and gates is None:
                raise ValueError("--certify-data says where to certify; say with --certify which accuracy")
            certifying = Certifying.of(certify, delta, certify_share, rule=gates is not None)
            if strangers is not None and gates is None:
                raise ValueError(
                    "--strangers are refused by the first gate, which the rule sdm does not have"
                )
            if may_lose is not None and (gates is None or decisions):
                raise ValueError(
                    "--may-lose leaves answers to known prompts unbegun: the rule sdm knows no prompts, and for "
                    "--decisions nothing is written"
                )
            upstream = _upstream(escalate_to, escalate_model, escalate_key_file)
            if upstream is not None and gates is None:
                raise ValueError("--escalate-to certifies the two gates with another model, and sdm has none")
            if decisions and (strangers or human or verifier or columns or temperature or resample > 1):
                raise ValueError(
                    "--decisions are read, not drawn or verified: leave out --strangers, --human, --verifier, "
                    "--columns, --temperature and --resample"
                )
            if decisions and upstream is not None:
                raise ValueError("--decisions are not handed on to another model: leave out --escalate-to")
            policy = Policy(
                temperature=temperature, max_tokens=1 if decisions else max_tokens, resample=resample
            )
            arguments = _template_arguments(template_arguments)
            reading = reading_of(columns, verifier)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        require_free(out)
        rendering = ChatFormat.from_directory(model) if decisions else None
        inputs = Inputs.load(data, test or [], certify_data, strangers, reading, rendering)
        for file in inputs.files:
            tell_what_was_read(file)
        reported = inputs.held_out or (inputs.fitting,)
        for file in reported:
            require_kind(kind, file)
        asked = [record.messages for record in inputs.fitting.records]
        policy = replace(policy, conversations=Conversations.of_records(asked, system_prompt, arguments))
        engine_settings = EngineSettings(
            model=model,
            kind=engine.value,
            representation=representation,
            dtype=dtype.value,
            max_model_len=max_model_len,
            eager=eager,
            vllm=vllm,
        )
        cache = hidden_cache or beside(review or out)
        asking = AnsweringOptions(
            cache, concurrency, seed, relabel, ask_person, _suspects(review), prompt_states=gates is not None
        )
        chat = rendering or ChatFormat.from_directory(model)
        chat.check(policy.conversations.for_template)
        require_possible(
            chat,
            inputs,
            policy,
            representation,
            settings,
            certifying,
            out,
            asking.cache,
            hidden_size=hidden_size_of(model),
            max_model_len=max_model_len,
        )
        if human is not None and certifying is not None:
            certifying = replace(certifying, agreement=_agreement(human, inputs, reading, asking.cache))
        if certifying is not None:
            apart = inputs.certification
            share = 1.0 if apart else certifying.share
            prompts = len({record.prompt_digest for record in (apart or inputs.fitting).records})
            for claim in certifying.claims(settings.alphas if gates else ()):
                if warning := certificate_hope(prompts, share, claim.accuracy, claim.delta):
                    typer.echo(f"Note: {warning}.", err=True)
        escalating = None
        if upstream is not None:
            escalating = Escalating(upstream, asking.cache, concurrency, relabel, ask_person)
            certified_on = (inputs.certification or inputs.fitting).records
            require_judged(certified_on)
            try_upstream(certified_on[0], policy, escalating)
        began = time.perf_counter()
        answers, answering_s = asyncio.run(_answer(adapter, engine_settings, chat, inputs, policy, asking))
        answered = time.perf_counter()
        made = make_bundle(
            inputs, answers, settings, out, name or out.resolve().name, certifying, gates, escalating
        )
        records = [record for file in reported for record in file.records]
        write_page(page or beside(out, ".html"), load_bundle(out), made.outcome.held_out, records, kind=kind)
        seconds = {
            "engine": answered - began - answering_s,
            "answering": answering_s,
            "fitting": time.perf_counter() - answered,
        }
        number = sum(len(file.records) for file in inputs.files)
        typer.echo(
            f"Seconds: {seconds['engine']:.0f} until the engine was ready, {answering_s:.0f} for {number} answers "
            f"({number / answering_s:.1f} a second), {seconds['fitting']:.0f} to fit, certify and report.",
            err=True,
        )
    outcome = made.outcome
    if as_json:
        typer.echo(
            json.dumps(
                {"bundle": str(out), "digest": made.digest, "seconds": seconds, "report": outcome.report}
            )
        )
        return
    if outcome.rule is not None:
        typer.echo(f"{outcome.rule}\n")
    if outcome.cascade is not None:
        typer.echo(f"{outcome.cascade}\n")
    typer.echo(table({"held out": outcome.evaluation}))
    if advice := str(outcome.advice):
        typer.echo(f"\n{advice}")
    typer.echo("\n" + base_rate_table(outcome.evaluation))
    if outcome.certification is not None:
        typer.echo("\n" + certificate.summary(outcome.certification))
    typer.echo(f"\n{out}: digest {made.digest}")


async def _answer(
    adapter: Path | None,
    engine_settings: EngineSettings,
    chat: ChatFormat,
    inputs: Inputs,
    policy: Policy,
    asking: AnsweringOptions,
) -> tuple[Answers, float]:
    """Answers all inputs, then closes the engine, since training needs its memory and cores.

    Returns also the seconds that the answers took, without the engine's start and end.
    """
    from candor.calibration.answering import answer_inputs
    from candor.calibration.kept import asked

    async def ask(engine: Engine) -> tuple[Answers, float]:
        began = time.perf_counter()
        answers = await answer_inputs(engine, chat, inputs, policy, asking)
        return answers, time.perf_counter() - began

    return await asked(engine_settings, chat, adapter, ask)


def _upstream(url: str | None, model: str | None, key_file: Path | None) -> Upstream | None:
    """Raises ValueError, which names the options."""
    from candor.policy.upstream import Upstream

    if url is None and model is None and key_file is None:
        return None
    if url is None or model is None:
        raise ValueError("--escalate-to and --escalate-model go together: give both")
    try:
        return Upstream(url, model, key_file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--escalate-to, --escalate-model, --escalate-key-file: {error}") from error


def _suspects(bundle: Path | None) -> frozenset[str]:
    """Ids of the answers whose labels a bundle's report names to be looked at. Raises BundleError."""
    from candor.model_store.bundle import load_bundle

    advice = {} if bundle is None else load_bundle(bundle).report.get("advice", {})
    return frozenset(one["id"] for one in advice.get("suspects", ()))


def _agreement(human: Path, inputs: Inputs, reading: Reading, cache: Path) -> Agreement:
    """Holds the verifier of the data to answers that people labelled, and says how often it agrees."""
    from candor.calibration.agreement import agreement
    from candor.calibration.answering import DataFile
    from candor.calibration.errors import DataError

    file = DataFile.load(human, reading)
    tell_what_was_read(file)
    names = {record.verifier for record in inputs.fitting.records if record.verifier is not None}
    if len(names) != 1:
        raise DataError(f"--human holds one verifier to people's labels, and the data has {len(names)}")
    found = agreement(file.records, names.pop(), cache)
    typer.echo(f"{human}: {found}", err=True)
    return found


def require_kind(kind: str | None, file: DataFile) -> None:
    """Raises DataError where the records do not have this column."""
    from candor.calibration.errors import DataError

    if kind is not None and (without := next((one for one in file.records if kind not in one.row), None)):
        raise DataError(f"{file.path}, {without.place}: no column {kind}; there are {', '.join(without.row)}")


def write_page(
    path: Path,
    bundle: Bundle,
    held_out: Sequence[Labelled],
    records: Sequence[Record],
    others: Mapping[str, Sequence[Labelled]] | None = None,
    kind: str | None = None,
) -> None:
    """Writes the report for people (`calibration.report_page`)."""
    from candor.calibration.report_page import page

    by_prompt = {one.prompt_digest: one for one in records}
    path.write_text(page(bundle, held_out, by_prompt, others, kind), encoding="utf-8")
    typer.echo(f"The report for people: {path}", err=True)


def reading_of(columns: str, verifier: str | None) -> Reading:
    """Raises ValueError."""
    from candor.calibration.shapes import Reading

    return Reading.parse(columns, verifier)


def tell_what_was_read(file: DataFile) -> None:
    """Says on standard error how a file was understood."""
    if file.loaded is not None:
        typer.echo(file.loaded.summary(), err=True)


def _template_arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--template-arguments: expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--template-arguments: expected a JSON object, got {text!r}")
    return found


def _by_commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def beside(bundle: Path, suffix: str = ".cache") -> Path:
    """Returns the default cache path, beside the bundle: the bundle's own folder may hold its verified files only."""
    bundle = bundle.resolve()
    return bundle.with_name(bundle.name + suffix)


@contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """Sends to standard error whatever is printed meanwhile, by this process or by the engine's."""
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


@contextmanager
def reporting_errors(
    *more: type[Exception],
    stopped: str = "Finished answers are kept: the same command goes on from here.",
) -> Iterator[None]:
    """Reports errors of input, engine and bundle, and those in `more`, as one message without a traceback; exit
    code 1. stopped: the message on Ctrl-C."""
    from candor.calibration.errors import CalibrationError
    from candor.engine.base import EngineError
    from candor.model_store.errors import BundleError

    foreseen: tuple[type[Exception], ...] = (CalibrationError, EngineError, BundleError, OSError, *more)
    try:
        yield
    except foreseen as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {stopped}", err=True)
        raise typer.Exit(130) from None
