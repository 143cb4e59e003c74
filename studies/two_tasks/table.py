"""Figures of several seeds as Markdown: means, with the smallest and the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from candor.comparison.compare import TITLES

ALPHA = "0.9"
SETS = {"test": "test", "shifted": "shifted", "ood": "out of distribution"}

Run = Mapping[str, Any]
"""One seed, as `Comparison.to_json` has it."""


@dataclass(frozen=True)
class Column:
    """value: of one method's scores; None where it has none. percent: as a share, with one digit."""

    title: str
    of: str
    value: Callable[[Mapping[str, Any]], float | None]
    percent: bool = True


def _admitted(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda scores: scores["admitted"][ALPHA][name]["value"]


def _ranked(view: str, name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda scores: scores[view].get(name, {}).get("value")


def let_through(sets: Mapping[str, str]) -> list[Column]:
    return [
        column
        for name, title in sets.items()
        for column in (
            Column(f"{title}: answered", name, _admitted("answered")),
            Column("right", name, _admitted("predicted_1")),
        )
    ]


VERDICTS = [
    Column("admitted", "test", _admitted("admitted")),
    Column("verdicts right", "test", _admitted("marginal")),
    Column("of wrong answers", "test", _admitted("class_0")),
    Column("of right answers", "test", _admitted("class_1")),
    Column("shifted: admitted", "shifted", _admitted("admitted")),
    Column("verdicts right", "shifted", _admitted("marginal")),
]

RANKING = [
    Column("answers: AURC", "test", _ranked("answers", "aurc"), percent=False),
    Column("coverage at 5 % risk", "test", _ranked("answers", "coverage_at_risk")),
    Column("shifted: AURC", "shifted", _ranked("answers", "aurc"), percent=False),
    Column("verdicts: AUGRC", "test", _ranked("verdicts", "augrc"), percent=False),
    Column("ECE", "test", _ranked("verdicts", "top_label_ece"), percent=False),
    Column("Brier", "test", _ranked("verdicts", "brier"), percent=False),
    Column("shifted: ECE", "shifted", _ranked("verdicts", "top_label_ece"), percent=False),
]

ASKED_AGAIN = [
    Column("answers: AURC", "test", _ranked("answers", "aurc"), percent=False),
    Column("ROC AUC", "test", _ranked("answers", "roc_auc"), percent=False),
    Column("shifted: AURC", "shifted", _ranked("answers", "aurc"), percent=False),
    Column("ROC AUC", "shifted", _ranked("answers", "roc_auc"), percent=False),
]


def markdown(found: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """found: by task, a run for each seed."""
    for task, runs in found.items():
        yield f"\n## {task.capitalize()}\n"
        yield _sizes(runs)
        for title, columns, part in (
            (f"Answers let through, alpha {ALPHA}", let_through(SETS), "sets"),
            (f"Verdicts admitted, alpha {ALPHA}", VERDICTS, "sets"),
            ("Ranking and probabilities", RANKING, "sets"),
            ("AnsweringOptions the model again", [*ASKED_AGAIN, *let_through(SETS)], "sampled"),
        ):
            if all(name in run[part] for run in runs for name in SETS):
                yield f"\n### {title}\n"
                yield from _table(runs, part, columns)


def _sizes(runs: Sequence[Run]) -> str:
    """What the figures are taken from."""
    one = runs[0]
    halves = f"{len(runs)} seeds; halves of {one['training_half']} and {one['calibration_half']} answers. "
    return halves + "; ".join(
        f"{title}: {found['records'] - sum(found['faults'].values())} of {found['records']} answers scored, "
        f"{100 * found['correct']:.1f} % right"
        for name, title in SETS.items()
        if (found := one["sets"].get(name))
    )


def _table(runs: Sequence[Run], part: str, columns: Sequence[Column]) -> Iterator[str]:
    costs = part == "sampled"
    ranks = "answers" if any(column.title.startswith("answers") for column in columns) else None
    yield "| " + " | ".join(
        [
            "method",
            *(column.title for column in columns),
            *(["AURC of answers against SDM HR lower"] if ranks else []),
            *(["tokens read", "written"] if costs else []),
        ]
    ) + " |"  # fmt: skip
    yield "|---" * (1 + len(columns) + bool(ranks) + 2 * costs) + "|"
    for method in runs[0][part]["test"]["methods"]:
        cells = [
            over_seeds(
                [column.value(run[part][column.of]["methods"][method]) for run in runs], column.percent
            )
            for column in columns
        ]
        if ranks:
            cells.append(
                _verdict([run[part]["test"]["methods"][method]["difference"].get(ranks, {}) for run in runs])
            )
        if costs:
            cost = runs[0][part]["test"]["cost"].get(method, {"read": 0, "written": 0})
            cells += [f"{cost[name]:.0f}" for name in ("read", "written")]
        yield "| " + " | ".join([TITLES[method], *cells]) + " |"


def over_seeds(values: Sequence[float | None], percent: bool) -> str:
    """Mean (smallest to largest) of what there is."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    scale, digits = (100, 1) if percent else (1, 3)
    low, mean, high = (f"{scale * x:.{digits}f}" for x in (min(known), sum(known) / len(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _verdict(differences: Sequence[Mapping[str, float | None]]) -> str:
    """In how many seeds the paired 95 % interval of the difference lies wholly on one side; lower is better."""
    better = sum((one.get("high") or 0) < 0 for one in differences)
    worse = sum((one.get("low") or 0) > 0 for one in differences)
    return f"better in {better}, worse in {worse} of {len(differences)}"
