"""`candor finetune` trains an SDM language model; `candor data word-ordering` makes training data for it.

With several processes or devices:
`accelerate launch --config_file finetune/configs/... -m candor.app.cli finetune ...`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from candor.app.commands.calibrate import VerifierName, reporting_errors
from candor.app.commands.data import data_app


class Loss(StrEnum):
    sdm = "sdm"
    ce = "ce"
    ual = "ual"
    first = "first"
    probe = "probe"


class Switch(StrEnum):
    on = "on"
    off = "off"


Share = Annotated[float, typer.Option(min=0, max=1)]


def finetune(
    model: Annotated[Path, typer.Option(help="Directory of the pretrained model.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Pairs to train on, or records for --loss probe: JSON, CSV, ... (docs/finetuning.md)."
        ),
    ],
    held_out: Annotated[
        Path, typer.Option(help="As --data, with other prompts, to choose the checkpoint by.")
    ],
    out: Annotated[Path, typer.Option(help="Where the run goes; its model/ is served.")],
    loss: Annotated[Loss, typer.Option(help="What is minimised.")] = Loss.sdm,
    hard_negatives: Annotated[
        Switch, typer.Option(help="Learn from the model's own wrong answers too.")
    ] = Switch.on,
    generate_from: Annotated[
        int, typer.Option(min=0, help="First epoch, from 0, with them; 0 where the model knows the task.")
    ] = 1,
    teacher: Annotated[Path | None, typer.Option(help="Directory of the teacher of --loss first.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Leads every conversation.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents a step, over all processes.")] = 16,
    micro_batch: Annotated[int, typer.Option(min=1, help="Documents a forward pass and process.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak; linear warm-up, then linear decay.")] = 3e-4,
    lora_rank: Annotated[int, typer.Option(min=0, help="0 trains every parameter.")] = 16,
    gamma_plus: Annotated[
        float, typer.Option(min=0, max=1, help="How often a document is shown as a positive.")
    ] = 0.5,
    gamma_gen: Annotated[
        float, typer.Option(min=0, max=1, help="How often a negative is generated anew.")
    ] = 0.5,
    gamma_diversity: Annotated[
        float, typer.Option(min=0, max=1, help="How often a generated negative is shown, if there is one.")
    ] = 0.5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer.")] = 128,
    layer_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the SDM layers on the way.")] = 200,
    layer_dim: Annotated[int, typer.Option(min=1, help="M, the size of their exemplar vectors.")] = 1000,
    layer_learning_rate: Annotated[float, typer.Option(help="Of their Adam.")] = 1e-5,
    evaluations: Annotated[int, typer.Option(min=1, help="An epoch.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Sampled answers a prompt, of --loss ual.")] = 4,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps; a multiple of 16.")] = 64,
    columns: Annotated[
        str,
        typer.Option(help='Columns of the pairs by field, such as "prompt=question, negative=rejected".'),
    ] = "",
    verifier: VerifierName = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    bf16: bool = True,
    gradient_checkpointing: bool = False,
    compile: bool = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Fine-tune a language model into an SDM language model (arXiv 2510.26183).

    A run that was stopped at any moment goes on with --resume and ends as one that was not.
    """
    from candor.finetune.errors import FinetuneError

    with reporting_errors(FinetuneError, stopped="--resume goes on from the last checkpoint."):
        from candor.calibration.answering import DataFile
        from candor.calibration.data import require_disjoint
        from candor.calibration.epochs import LayerSettings
        from candor.finetune.data import PairReading, load_pairs, require_apart
        from candor.finetune.probe import ProbeTraining
        from candor.finetune.settings import FinetuneSettings
        from candor.finetune.trainer import Trainer

        try:
            settings = FinetuneSettings(
                loss=loss.value,
                hard_negatives=hard_negatives is Switch.on,
                generate_from=generate_from,
                epochs=epochs,
                batch_size=batch_size,
                micro_batch=micro_batch,
                learning_rate=learning_rate,
                lora_rank=lora_rank,
                gamma_plus=gamma_plus,
                gamma_gen=gamma_gen,
                gamma_diversity=gamma_diversity,
                system_prompt=system_prompt,
                max_tokens=max_tokens,
                layer=LayerSettings(layer_dim, layer_epochs, learning_rate=layer_learning_rate),
                evaluations=evaluations,
                samples=samples,
                checkpoint_every=checkpoint_every,
                seed=seed,
                bf16=bf16,
                gradient_checkpointing=gradient_checkpointing,
                compile=compile,
            )
            reading = PairReading.parse(columns, verifier)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if loss is Loss.probe:
            if teacher is not None:
                raise FinetuneError('a teacher goes with --loss first; "probe" learns from labels')
            own, held = (DataFile.load(path, reading.record) for path in (data, held_out))
            require_disjoint(data, own.records, held_out, held.records)
            probe = ProbeTraining(model, own, held, out, settings)
            final = probe.run(resume)
            if probe.accelerator.is_main_process:
                typer.echo(str(probe.known))
        else:
            pairs, others = load_pairs(data, reading), load_pairs(held_out, reading)
            require_apart(data, pairs, held_out, others)
            final = Trainer(model, pairs, others, out, settings, teacher).run(resume)
    typer.echo(f"{final}: next, `candor calibrate --model {final} ...`")


@data_app.command("word-ordering")
def word_ordering(
    sentences: Annotated[
        list[str],
        typer.Option(help="A file of one sentence a line, a WikiSplit .tsv, or hf:NAME; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the JSON Lines files.")],
    words: Annotated[
        str, typer.Option(help="How many last words are shuffled: 3, or 2-5 for mixed difficulty.")
    ] = "3",
    length: Annotated[str, typer.Option(help="Words of a sentence.")] = "5-59",
    shifted_length: Annotated[str, typer.Option(help="Words of a sentence of the shifted test set.")] = "60",
    train: Annotated[int, typer.Option(min=1, help="Prompts.")] = 5000,
    development: Annotated[int, typer.Option(min=1, help="Prompts to choose the checkpoint by.")] = 500,
    calibration: Annotated[int, typer.Option(min=1, help="Prompts.")] = 5000,
    test: Annotated[int, typer.Option(min=1, help="Prompts.")] = 2000,
    shifted: Annotated[int, typer.Option(min=0, help="Prompts.")] = 2000,
    also_test: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: sentences for a test set of their own, such as Harvard's; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """The data of arXiv 2510.26183 from any sentences: put a sentence's last words in order."""
    from candor.finetune.errors import SentencesError

    with reporting_errors(SentencesError, stopped="The same command makes the files anew."):
        from candor.finetune import word_ordering as task

        sizes = task.Sizes(
            words=_range("words", words),
            length=_range("length", length),
            shifted_length=_range("shifted-length", shifted_length),
            train=train,
            development=development,
            calibration=calibration,
            test=test,
            shifted=shifted,
        )
        tests = dict(_named(entry) for entry in also_test or [])
        files = task.build(
            [line for source in sentences for line in task.read_sentences(source)],
            {name: task.read_sentences(source) for name, source in tests.items()},
            sizes,
            seed,
        )
        task.write(files, out)
    for name, lines in files.items():
        typer.echo(f"{len(lines):6d} prompts -> {out / name}.jsonl")
    typer.echo(f'The prompts hold the words alone; the task is the system prompt: "{task.SYSTEM_PROMPT}"')


def _range(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise typer.BadParameter(f'--{name}: expected a number or a range such as 2-5, got "{text}"')
    return bounds


def _named(entry: str) -> tuple[str, str]:
    name, equals, source = entry.partition("=")
    if not (equals and name and source):
        raise typer.BadParameter(f'--also-test: expected NAME=FILE, got "{entry}"')
    return name, source
