"""A comparison as tables, with one definition for terminal, Markdown and HTML.

Each set has three tables: shares admitted at each alpha, ranking of answers, ranking of verdicts. In the two
rankings the best value of each column is marked; where the intervals overlap, best means little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from candor.calibration.ranking import Figure
from candor.comparison.comparators import REFERENCE
from candor.comparison.compare import TITLES, Comparison, MethodFigures, SetComparison

SHARES = {
    "admitted": "admitted",
    "marginal": "right",
    "class_0": "given y=0",
    "class_1": "given y=1",
    "predicted_0": "verdict 0",
    "answered": "answered",
    "predicted_1": "right if answered",
}
RANKS = {
    "coverage_at_risk": "coverage at 5 % risk",
    "aurc": "AURC",
    "e_aurc": "E-AURC",
    "augrc": "AUGRC",
    "prr": "PRR",
    "roc_auc": "ROC AUC",
}
SURE = {"top_label_ece": "top-label ECE", "brier": "Brier"}
HIGHER_IS_BETTER = ("coverage_at_risk", "prr", "roc_auc")
PER_CENT = (*SHARES, "coverage_at_risk")


@dataclass(frozen=True)
class Cell:
    """A value as text, its interval as text (empty if none), and whether it is the best in its column."""

    value: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """rows: (method's title, cells)."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def tables(comparison: Comparison, name: str, one: SetComparison) -> Iterator[Table]:
    """Every table of the set called `name`."""
    for alpha in comparison.fitting.alphas:
        yield Table(
            f"{name}: admitted at alpha = {alpha}",
            "In per cent. Right: verdicts that hold, of the admitted; given y=0 and y=1: of those whose answer is "
            "truly wrong and right; verdict 0: of those judged wrong. Answered: admitted and judged right, of "
            "all scored. Exact 95 % intervals.",
            tuple(SHARES.values()),
            _rows(one, list(SHARES), lambda scores, alpha=alpha: scores.admitted[alpha], {}),  # type: ignore[misc]
        )
    yield Table(
        f"{name}: ranking answers",
        "Answers let through from the surest down; risk is the share of wrong answers among them. "
        f"Difference: AURC less that of {TITLES[REFERENCE]}, paired; negative is better. "
        "Bootstrap 95 % intervals.",
        (*RANKS.values(), "difference"),
        _rows(one, [*RANKS, "answers"], lambda s: {**s.answers, **_difference(s, "answers")}, RANKS),
    )
    yield Table(
        f"{name}: ranking verdicts",
        "Verdicts taken from the surest down, right or wrong answer alike; risk is the share of verdicts that do not "
        "hold. Bootstrap 95 % intervals.",
        (*RANKS.values(), "difference", *SURE.values()),
        _rows(
            one,
            [*RANKS, "verdicts", *SURE],
            lambda s: {**s.verdicts, **_difference(s, "verdicts")},
            {**RANKS, **SURE},
        ),
    )


def cost_table(name: str, one: SetComparison) -> Table:
    """Tokens of the methods that ask again."""
    header = ("prompt tokens read", "tokens written", "replies used")
    rows = tuple(
        (
            TITLES[method],
            (
                Cell(f"{cost['read']:.1f}"),
                Cell(f"{cost['written']:.1f}"),
                Cell(f"{100 * cost['usable']:.0f} %"),
            ),
        )
        for method, cost in one.cost.items()
    )
    note = "A record, beyond the answer itself; every other method costs none. Before any prefix cache."
    return Table(f"{name}: cost of asking again", note, header, rows)


def as_text(table: Table) -> str:
    """The table for a terminal: values only; the files hold the intervals."""
    widths = [max(len(title), 7) + 2 for title in table.header]
    lines = [table.title, " " * 20 + "".join(f"{t:>{w}}" for t, w in zip(table.header, widths, strict=True))]
    for title, cells in table.rows:
        values = (
            f"{cell.value + ('*' if cell.best else ' '):>{w}}" for cell, w in zip(cells, widths, strict=True)
        )
        lines.append(f"{title:<20}" + "".join(values).rstrip())
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", table.note, ""]
    lines.append("| " + " | ".join(["method", *table.header]) + " |")
    lines.append("|---" * (len(table.header) + 1) + "|")
    for title, cells in table.rows:
        shown = [
            (f"**{cell.value}**" if cell.best else cell.value)
            + (f" {cell.interval}" if cell.interval else "")
            for cell in cells
        ]
        lines.append("| " + " | ".join([title, *shown]) + " |")
    return "\n".join(lines)


def heading(name: str, one: SetComparison) -> str:
    """A line that describes the set."""
    faults = ", ".join(f"{count} {fault}" for fault, count in one.faults.items())
    left_out = f"; left out, and admitted by none: {faults}" if faults else ""
    right = int(one.y.sum())
    return f"{name}: {one.records} records, {right} of {len(one.y)} scored answers right{left_out}"


def _rows(
    one: SetComparison,
    columns: list[str],
    pick: Callable[[MethodFigures], Mapping[str, Figure]],
    compared: Mapping[str, str],
) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    picked = {method: pick(scores) for method, scores in one.scores.items()}
    best = {column: _best(column, picked) for column in columns if column in compared}
    return tuple(
        (TITLES[method], tuple(_cell(column, found.get(column), best.get(column)) for column in columns))
        for method, found in picked.items()
    )


def _best(column: str, picked: Mapping[str, Mapping[str, Figure]]) -> float | None:
    values = [found[column].value for found in picked.values() if column in found]
    known = [value for value in values if value is not None]
    if not known or min(known) == max(known):
        return None
    return max(known) if column in HIGHER_IS_BETTER else min(known)


def _cell(column: str, figure: Figure | None, best: float | None) -> Cell:
    if figure is None or figure.value is None:
        return Cell("-")
    low, high = figure.exact or (figure.low, figure.high)
    scale, digits = (100, 1) if column in PER_CENT else (1, 3)
    interval = "" if low is None or high is None else f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return Cell(f"{scale * figure.value:.{digits}f}", interval, figure.value == best)


def _difference(scores: MethodFigures, view: str) -> dict[str, Figure]:
    return {view: scores.difference[view]} if view in scores.difference else {}
