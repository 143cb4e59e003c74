"""SDM beside other methods on the demo's task, over several seeds of the layer.

    python -m benchmarks.comparison [--seeds 3] [--json]

A seed deals the halves anew, trains one layer (J = 1) and fits every method on those halves; all seeds judge the same
three sets. Figures of a finished seed are kept in var/demo/comparison, so a stopped run goes on; delete them to
measure anew. Answers come from var/demo/answers; what is not there is generated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.calibrate import EngineKind
from demo.task import made

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "var/demo"
SETS = ("test", "shifted", "ood")
ROUNDS = 1

ADMITTED = {
    "admitted": "admitted",
    "marginal": "verdicts right",
    "class_0": "given y=0",
    "answered": "answered",
    "predicted_1": "right if answered",
}
ANSWERS = {"coverage_at_risk": "coverage at 5 % risk", "aurc": "AURC", "prr": "PRR", "roc_auc": "ROC AUC"}
VERDICTS = {
    "coverage_at_risk": "coverage at 5 % risk",
    "aurc": "AURC",
    "augrc": "AUGRC",
    "roc_auc": "ROC AUC",
    "top_label_ece": "top-label ECE",
    "brier": "Brier",
}
PER_CENT = (*ADMITTED, "coverage_at_risk")


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle whose settings are repeated.")] = ROOT / "demo/bundle",
    model: Annotated[Path, typer.Option(help="Directory of the model.")] = ROOT
    / "var/models/smollm2-135m-word-ordering",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the layer.")] = 3,
    ensemble: Annotated[int, typer.Option(min=2, help="Layers of the ensemble.")] = 3,
    engine: EngineKind = EngineKind.vllm,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    made("test")
    kept = {seed: DATA / f"comparison/seed-{seed}-of-{ensemble}.json" for seed in range(seeds)}
    missing = [seed for seed, path in kept.items() if not path.exists()]
    if missing:
        _measure(bundle, model, engine, ensemble, {seed: kept[seed] for seed in missing})
    runs = [json.loads(path.read_text()) for path in kept.values()]
    if as_json:
        typer.echo(json.dumps({"seeds": runs}))
    else:
        typer.echo("\n".join(_tables(runs)))


def _measure(path: Path, model: Path, kind: EngineKind, ensemble: int, out: Mapping[int, Path]) -> None:
    from tqdm import tqdm

    from calibration.comparators import COMPARATORS
    from calibration.comparators.base import Fitting
    from calibration.compare import Comparison, compare, layer_settings
    from calibration.fit import FitSettings, fit
    from model_store.bundle import load_bundle

    bundle = load_bundle(path)
    manifest, told = bundle.manifest, bundle.manifest.provenance["settings"]
    layer = layer_settings(manifest)
    assert layer.blocks is not None  # set by `layer_settings`
    answers = asyncio.run(_answers(model, kind, bundle))
    for seed, file in out.items():
        settings = FitSettings(
            manifest.alphas, ROUNDS, told["epochs"], told["exemplar_dim"], told["learning_rate"], seed
        )
        with tqdm(total=settings.epochs, desc=f"seed {seed}", unit="epoch") as bar:
            fitted = fit(answers["calibration"], layer.blocks, settings, bar.update)
        fitting = Fitting(
            fitted.estimator, fitted.training, fitted.calibration, layer, manifest.alphas, seed, ensemble
        )
        sets = {name: answers[name] for name in SETS}
        with tqdm(total=len(COMPARATORS), desc=f"seed {seed}", unit="method") as bar:

            def done(_: str, bar: tqdm = bar) -> None:
                bar.update(1)

            compared = compare(fitting, sets, list(COMPARATORS), done)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(Comparison(fitting, compared, {}).to_json()))


async def _answers(model: Path, kind: EngineKind, bundle: Any) -> dict[str, Any]:
    from app.backend import check_identity
    from calibration.run import Asking, DataFile, answer_file
    from engine.factory import EngineSettings, start_engine
    from engine.prompt import ChatFormat

    manifest = bundle.manifest
    chat = ChatFormat.from_directory(model)
    settings = EngineSettings(
        model=model,
        kind=kind.value,
        representation=manifest.representation,
        dtype=manifest.model.dtype,
        max_model_len=1024,
    )
    engine = await start_engine(settings, chat)
    try:
        check_identity(engine, bundle)
        asking = Asking(DATA / "answers", 64, 0)
        return {
            name: await answer_file(
                engine,
                chat,
                DataFile.load(DATA / f"{name}.jsonl"),
                manifest.policy,
                asking,
                f"answering {name}",
            )
            for name in ("calibration", *SETS)
        }
    finally:
        await engine.close()


def _tables(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: means over the seeds, with the smallest and largest."""
    alphas = [str(alpha) for alpha in runs[0]["alphas"]]
    for name in SETS:
        for alpha in alphas:
            yield f"\n### {name}, admitted at alpha = {alpha}\n"
            yield from _table(runs, name, ADMITTED, lambda method, alpha=alpha: method["admitted"][alpha])
        if name != "ood":
            yield f"\n### {name}, ranking answers\n"
            yield from _table(runs, name, ANSWERS, lambda method: method["answers"], "answers")
        yield f"\n### {name}, ranking verdicts\n"
        yield from _table(runs, name, VERDICTS, lambda method: method["verdicts"], "verdicts")


def _table(
    runs: list[dict[str, Any]], name: str, columns: Mapping[str, str], pick: Any, view: str | None = None
) -> Iterator[str]:
    from calibration.compare import TITLES

    header = ["method", *columns.values(), *(["AURC against SDM HR lower"] if view else [])]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for method in runs[0]["sets"][name]["methods"]:
        each = [run["sets"][name]["methods"][method] for run in runs]
        cells = [
            _over_seeds([pick(one).get(column, {}).get("value") for one in each], column)
            for column in columns
        ]
        if view:
            cells.append(_verdict([one["difference"].get(view, {}) for one in each]))
        yield "| " + " | ".join([TITLES[method], *cells]) + " |"


def _over_seeds(values: list[float | None], column: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    scale, digits = (100, 1) if column in PER_CENT else (1, 3)
    low, mean, high = (scale * x for x in (min(known), sum(known) / len(known), max(known)))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _verdict(differences: list[dict[str, float]]) -> str:
    """In how many seeds the paired 95 % interval of the difference lies wholly on one side."""
    better = sum(one.get("high", 1) < 0 for one in differences)
    worse = sum(one.get("low", -1) > 0 for one in differences)
    return f"better in {better}, worse in {worse} of {len(differences)}"


if __name__ == "__main__":
    typer.run(main)
