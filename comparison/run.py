"""Collects everything that a comparison needs from the engine, and then runs the comparison.

    answers of every set, and of the file that the bundle was made from      from the cache where they are known
    further questions about a part of each, for methods that ask again       also cached
    engine closed
    fit, score, tables, figures

Methods that ask again are fitted on as many prompts of the calibration half as they are scored on in each set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from candor.calibration.answering import AnsweringOptions, DataFile, answer_file
from candor.calibration.cache import AnswerCache, CachedAnswer
from candor.calibration.data import Record
from candor.calibration.errors import DataError
from candor.calibration.generate import Labelled, Watch, scorable
from candor.calibration.verifiers import Verdict
from candor.comparison.comparators import COMPARATORS, REFERENCE, SAMPLERS
from candor.comparison.comparators.base import Fitting, MethodVerdicts
from candor.comparison.comparators.passes import AskedAgain, ask
from candor.comparison.comparators.platt import judge
from candor.comparison.comparators.verbalised import stated
from candor.comparison.compare import Comparison, compare, halves, with_samplers
from candor.comparison.page import page
from candor.comparison.tables import as_markdown, cost_table, heading, tables
from candor.engine.base import Engine
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle

CALIBRATION = "calibration"
"""The name, among the sets, of the part of the calibration half that is asked again."""


@dataclass(frozen=True)
class CompareSettings:
    """methods: names from COMPARATORS and SAMPLERS. ensemble: layers of the ensemble. asked: prompts of each set, and
    of the calibration half, that the model is asked about again. Raises ValueError for an unknown method."""

    methods: tuple[str, ...]
    ensemble: int = 3
    asked: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        known = [*COMPARATORS, *SAMPLERS]
        unknown = [name for name in self.methods if name not in known]
        if unknown or not self.methods:
            raise ValueError(f"unknown methods {unknown}: give all, or some of {', '.join(known)}, by commas")

    @property
    def samplers(self) -> list[str]:
        return [name for name in SAMPLERS if name in self.methods and self.asked > 0]

    @property
    def comparators(self) -> list[str]:
        """The comparators in the registry's order; the reference of differences is always among them."""
        return [name for name in COMPARATORS if name in (*self.methods, REFERENCE)]


@dataclass(frozen=True, eq=False)
class ComparisonData:
    """The engine's results: the bundle's halves, every set's answers, and further replies by method and set."""

    fitting: Fitting
    sets: dict[str, list[Labelled]]
    asked: dict[str, dict[str, list[AskedAgain]]]


async def gather(
    engine: Engine,
    chat: ChatFormat,
    bundle: Bundle,
    calibration: DataFile,
    sets: Mapping[str, DataFile],
    settings: CompareSettings,
    asking: AnsweringOptions,
) -> ComparisonData:
    """Raises CalibrationError or EngineError."""
    policy = bundle.manifest.policy
    fitted = await answer_file(
        engine,
        chat,
        calibration,
        policy,
        asking,
        "answering what the bundle was made from",
        _same_as(bundle),
    )
    fitting = halves(bundle, fitted, settings.seed, settings.ensemble)
    answers = {
        name: await answer_file(engine, chat, file, policy, asking, f"answering {name}")
        for name, file in sets.items()
    }
    conversations = {
        name: {record.id: policy.conversations.resolve(record.messages) for record in file.records}
        for name, file in {CALIBRATION: calibration, **sets}.items()
    }
    parts = {
        name: _some(found, settings) for name, found in {CALIBRATION: fitting.calibration, **answers}.items()
    }
    asked: dict[str, dict[str, list[AskedAgain]]] = {}
    for method in settings.samplers:
        sampler = SAMPLERS[method]
        asked[method] = {}
        for name, part in parts.items():
            questions = [sampler.questions(conversations[name][one.id], one, policy) for one in part]
            with (
                AnswerCache(asking.cache) as cache,
                tqdm(total=sum(map(len, questions)), desc=f"{sampler.title}, {name}", unit="reply") as bar,
            ):
                replies = await ask(engine, chat, questions, cache, asking.concurrency, bar.update)
            asked[method][name] = [
                AskedAgain(conversations[name][one.id], one, reply)
                for one, reply in zip(part, replies, strict=True)
            ]
    return ComparisonData(fitting, answers, asked)


def _same_as(bundle: Bundle) -> Watch:
    """Ends the run at the first answer that is not the bundle's: another machine may give others."""
    exemplars = {one.id: one for one in bundle.exemplars}

    def watch(record: Record, answer: CachedAnswer, verdict: Verdict) -> None:
        one = exemplars.get(record.id)
        if one is not None and not answer.truncated and one.response != answer.response:
            raise DataError(
                f"{record.place}: the bundle was made from the answer {one.response!r}, and this is "
                f"{answer.response!r}. Another processor may give other answers: copy the folder of kept answers "
                "from where the bundle was made, and name it with --hidden-cache"
            )
        if one is not None and verdict is not None and int(verdict) != one.label:
            raise DataError(
                f"{record.place}: the bundle was made with the label {one.label}, and this is {int(verdict)}: give "
                "--calibration the file that it was made from"
            )

    return watch


def run_comparison(material: ComparisonData, settings: CompareSettings) -> Comparison:
    """Fits and scores everything; it needs no engine."""
    fitting = material.fitting
    names = [name for name in settings.comparators if name != "two_gates" or fitting.gates is not None]
    with tqdm(total=len(names), desc="comparing", unit="method") as bar:

        def done(title: str) -> None:
            bar.set_postfix_str(title)
            bar.update(1)

        sets = compare(fitting, material.sets, names, done)
    sampled = {}
    if material.asked:
        for name, whole in sets.items():
            by_method = {method: found[name] for method, found in material.asked.items()}
            ids = [one.answer.id for one in next(iter(by_method.values()))]
            more = {
                method: _judged(method, found, material.asked[method][CALIBRATION], fitting.alphas)
                for method, found in by_method.items()
            }
            cost = {method: _cost(method, found) for method, found in by_method.items()}
            sampled[name] = with_samplers(whole, ids, more, cost, fitting.seed)
    return Comparison(fitting, sets, sampled)


def write(bundle: Bundle, comparison: Comparison, folder: Path) -> list[Path]:
    """Writes comparison.json, comparison.md and comparison.html to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"bundle": bundle.manifest.name, "digest": bundle.digest, **comparison.to_json()}
    contents = {
        "comparison.json": json.dumps(fields, indent=1) + "\n",
        "comparison.md": markdown(bundle, comparison),
        "comparison.html": page(bundle, comparison),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


def markdown(bundle: Bundle, comparison: Comparison) -> str:
    parts = [
        f"# {bundle.manifest.name}: comparison",
        f"Bundle `{bundle.digest[:12]}`. Best values in bold; differences are to what is served.",
    ]
    for name, one in comparison.sets.items():
        parts.append(f"## {heading(name, one)}")
        parts += [as_markdown(table) for table in tables(comparison, name, one)]
    for name, one in comparison.sampled.items():
        parts.append(f"## AnsweringOptions the model again: {heading(name, one)}")
        parts += [as_markdown(table) for table in (cost_table(name, one), *tables(comparison, name, one))]
    return "\n\n".join(parts) + "\n"


def _some(answers: Sequence[Labelled], settings: CompareSettings) -> list[Labelled]:
    """At most `settings.asked` of the scorable answers, drawn at random and kept in order."""
    usable = scorable(answers)
    drawn = torch.randperm(len(usable), generator=torch.Generator().manual_seed(settings.seed))
    return [usable[index] for index in sorted(drawn[: settings.asked].tolist())]


def _judged(
    method: str, asked: Sequence[AskedAgain], known: Sequence[AskedAgain], alphas: Sequence[float]
) -> MethodVerdicts:
    score = SAMPLERS[method].score
    return judge(
        [score(one) for one in known],
        [one.answer.label for one in known],
        [score(one) for one in asked],
        alphas,
    )


def _cost(method: str, asked: Sequence[AskedAgain]) -> dict[str, float]:
    """Means over records. usable: share of records whose replies this method can use."""
    usable = [method != "verbalised" or stated(one.replies.texts[0]) is not None for one in asked]
    return {
        "read": sum(one.replies.read for one in asked) / len(asked),
        "written": sum(one.replies.written for one in asked) / len(asked),
        "usable": sum(usable) / len(asked),
    }
