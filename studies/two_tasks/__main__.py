"""SDM beside other methods on two tasks, over several seeds of the layer; a stopped run goes on where it was.

    python -m studies.two_tasks --gsm8k FILE [--seeds 3] [--json]

Word ordering is the demo's task, model and bundle. For arithmetic everything is made: data, a fine-tuned model,
a bundle. Then for both: the bundle's own report (`candor evaluate --compare all`, which asks the model all that is
asked of it), and for every seed halves dealt anew, a layer fitted on them as the bundle's was, and every method
beside it on the same answers. Methods that ask the model again judge `--asked` prompts of each set; every other
method is scored on these too. A bundle that was made anew is measured anew.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from candor.model_store.bundle import load_bundle
from demo import task as word_ordering
from studies.two_tasks import arithmetic, table
from studies.two_tasks.tasks import ARITHMETIC, DEMO, ROOT, SETS, Task, answers, finished

BASE = ROOT / "var/models/smollm2-135m-instruct"


def main(
    gsm8k: Annotated[
        Path, typer.Option(help="Questions of GSM8K, JSON Lines (studies/two_tasks/arithmetic.py).")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the layer.")] = 3,
    asked: Annotated[int, typer.Option(min=0, help="Prompts of each set that are asked again.")] = 50,
    ensemble: Annotated[int, typer.Option(min=2, help="Layers of the ensemble.")] = 3,
    only: Annotated[str | None, typer.Option(help="One task's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")] = False,
) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in (DEMO, ARITHMETIC):
        if only in (None, one.name):
            make(one, gsm8k)
            report(one, asked, ensemble)
            found[one.name] = measure(one, range(seeds), asked, ensemble)
    typer.echo(json.dumps(found) if as_json else "\n".join(table.markdown(found)))


def make(task: Task, gsm8k: Path) -> None:
    """Whatever the task lacks."""
    if task is DEMO:
        if not task.file("ood").exists():
            word_ordering.main(sentences=ROOT / "demo/sentences.txt", out=task.data)
        return
    if not task.file("ood").exists():
        arithmetic.main(gsm8k, task.data)
    run = task.model.parent
    if not task.model.exists():
        candor(
            *("finetune", "--model", BASE, "--out", run),
            *("--data", task.file("train"), "--held-out", task.file("development")),
            *("--loss", "ce", "--hard-negatives", "off", "--gamma-plus", "1"),
            *("--epochs", "1", "--learning-rate", "1e-3"),
            *(("--resume",) if (run / "settings.json").exists() else ()),
        )
    if not task.bundle.exists():
        candor(
            *("calibrate", "--model", task.model, "--out", task.bundle, "--name", task.name),
            *("--data", task.file("calibration"), "--test", task.file("test")),
            *("--alpha", "0.9", "--alpha", "0.95", "--certify", "0.95", "--max-tokens", "96"),
            *("--exemplar-dim", "256", "--learning-rate", "1e-4", "--epochs", "100"),
            *("--max-model-len", "1024", "--hidden-cache", task.answers),
        )


def report(task: Task, asked: int, ensemble: int) -> None:
    """Tables and plots of the task's bundle; leaves every answer and reply in the cache."""
    if (_folder(task) / "report/comparison.html").exists():
        return
    candor(
        *("evaluate", "--bundle", task.bundle, "--model", task.model, "--data", task.file("test")),
        *(
            "--shifted",
            task.file("shifted"),
            "--ood",
            task.file("ood"),
            "--calibration",
            task.file("calibration"),
        ),
        *("--compare", "all", "--asked", asked, "--ensemble", ensemble, "--report", _folder(task) / "report"),
        *("--max-model-len", "1024", "--hidden-cache", task.answers),
    )


def _folder(task: Task) -> Path:
    """Where figures of the task's bundle, as it is now, are kept."""
    return task.data / "comparison" / load_bundle(task.bundle).digest[:12]


def candor(*arguments: object) -> None:
    command = (sys.executable, "-c", "from candor.app.cli import main; main()", *map(str, arguments))
    subprocess.run(command, check=True, stdout=sys.stderr)


def measure(task: Task, seeds: Sequence[int], asked: int, ensemble: int) -> list[dict[str, Any]]:
    """Every seed's figures as `Comparison.to_json` has them."""
    from tqdm import tqdm

    from candor.calibration.answering import AnsweringOptions, DataFile
    from candor.calibration.fit import FitSettings, fit
    from candor.comparison.comparators import COMPARATORS, SAMPLERS
    from candor.comparison.comparators.base import Fitting
    from candor.comparison.run import CompareSettings, gather, run_comparison
    from candor.engine.prompt import ChatFormat

    bundle = load_bundle(task.bundle)
    folder = _folder(task)
    kept = {seed: folder / f"seed-{seed}-of-{ensemble}-asked-{asked}.json" for seed in seeds}
    if all(path.exists() for path in kept.values()):
        return [json.loads(path.read_text()) for path in kept.values()]
    manifest, settings = bundle.manifest, CompareSettings((*COMPARATORS, *SAMPLERS), ensemble, asked)
    chat, asking = ChatFormat.from_directory(task.model), AnsweringOptions(task.answers, 1)
    engine = finished(task.model, manifest, chat)
    calibration = DataFile.load(task.file("calibration"))
    files = {name: DataFile.load(task.file(name)) for name in SETS}
    material = asyncio.run(gather(engine, chat, bundle, calibration, files, settings, asking))
    to_fit_on = answers(task, "calibration")
    fitting, told = material.fitting, manifest.provenance["settings"]
    assert fitting.layer.blocks is not None  # set by `layer_settings`
    for seed, path in kept.items():
        if path.exists():
            continue
        layer = FitSettings(
            manifest.alphas, told["rounds"], told["epochs"], told["exemplar_dim"], told["learning_rate"], seed
        )
        with tqdm(total=layer.rounds * layer.epochs, desc=f"{task.name}, seed {seed}", unit="epoch") as bar:
            fitted = fit(to_fit_on, fitting.layer.blocks, layer, bar.update)
        halves = Fitting(
            fitted.estimator,
            fitted.training,
            fitted.calibration,
            fitting.layer,
            manifest.alphas,
            seed,
            ensemble,
        )
        compared = run_comparison(replace(material, fitting=halves), settings)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compared.to_json()))
    return [json.loads(path.read_text()) for path in kept.values()]


if __name__ == "__main__":
    typer.run(main)
