"""The report's figures, as SVG in black and grey with line styles, markers and hatching, so that they print well.

Without colour, many methods in one pair of axes cannot be distinguished. So each method has its own small panel,
which shows it in black and all the others in grey.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from candor.calibration.intervals import clopper_pearson
from candor.calibration.ranking import answer_order
from candor.comparison.comparators import REFERENCE
from candor.comparison.compare import TITLES, SetComparison
from candor.sdm.estimator import SDMEstimator

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "svg.hashsalt": "candor",  # the same figure gives the same bytes
    "legend.frameon": False,
}
LIGHT, DARK = "0.8", "0.0"
COLUMNS = 5
RELIABILITY_BINS = 10
MOST_RISK = 0.15
"""The risk where curves are cut off, since only the lower part matters for letting answers through."""
CLASS_STYLES = ("--", "-")
SET_STYLES = ((":", "o"), ("-.", "s"), ((0, (5, 1, 1, 1, 1, 1)), "^"))


def risk_coverage(one: SetComparison) -> bytes:
    """Coverage against the share of wrong answers, for answers let through from the most confident down."""
    curves = {
        name: _curve(answer_order(verdicts.confidence, verdicts.y_hat), one.y == 0)
        for name, verdicts in one.verdicts.items()
    }
    wrong = float((one.y == 0).double().mean())
    highest = 1.1 if wrong > 0.5 else max(0.02, min(1.15 * wrong, MOST_RISK))

    def panel(axes: Axes, name: str) -> None:
        for other in curves.values():
            axes.plot(*other, color=LIGHT, linewidth=0.5, zorder=1)
        axes.plot(*curves[REFERENCE], color=DARK, linewidth=0.9, linestyle=":", zorder=2)
        axes.plot(*curves[name], color=DARK, linewidth=1.4, zorder=3)
        axes.axhline(0.05, color="0.5", linewidth=0.5, linestyle=(0, (1, 3)), zorder=0)
        axes.set(xlim=(0, 1), ylim=(0, highest))

    return _panels(list(curves), panel, "coverage: share of answers let through", "risk: share of them wrong")


def reliability(one: SetComparison) -> bytes:
    """Probability that the verdict is right against how often it is, in bins, with exact intervals."""
    named = {name: verdicts for name, verdicts in one.verdicts.items() if verdicts.probability is not None}

    def panel(axes: Axes, name: str) -> None:
        verdicts = named[name]
        assert verdicts.probability is not None
        right = verdicts.y_hat == one.y
        bins = (verdicts.probability * RELIABILITY_BINS).long().clamp(max=RELIABILITY_BINS - 1)
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.6, linestyle=":")
        for number in bins.unique().tolist():
            inside = bins == number
            hits, of = int(right[inside].sum()), int(inside.sum())
            at = float(verdicts.probability[inside].mean())
            axes.vlines(at, *clopper_pearson(hits, of), color="0.4", linewidth=0.8)
            size = 4 + 60 * of / len(right)
            axes.scatter(
                [at], [hits / of], s=size, facecolor="white", edgecolor=DARK, linewidth=0.9, zorder=3
            )
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))

    return _panels(list(named), panel, "probability given that the verdict holds", "share that held")


def plane(estimator: SDMEstimator, sets: Mapping[str, SetComparison], alpha: float) -> bytes:
    """q' against SDM(z') of the verdict: one row a set, one column a verdict; the region at alpha is hatched."""
    region = estimator.regions[alpha]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 2.5 * len(sets)), layout="constrained")
        grid = figure.subplots(len(sets), 2, squeeze=False, sharex=True, sharey=True)
        for axes_row, (name, one) in zip(grid, sets.items(), strict=True):
            _, sdm, q_prime = estimator.activate(one.rows.measurement)
            y_hat = one.rows.y_hat
            top = sdm.gather(1, y_hat.unsqueeze(1)).squeeze(1)
            for c, axes in enumerate(axes_row):
                for right, marker, face, size in ((True, "o", "none", 9), (False, "x", DARK, 16)):
                    shown = (y_hat == c) & ((one.y == y_hat) == right)
                    axes.scatter(
                        q_prime[shown].numpy(),
                        top[shown].numpy(),
                        marker=marker,
                        s=size,
                        facecolors=face,
                        edgecolors="0.55" if right else None,
                        linewidths=0.5 if right else 0.9,
                        zorder=2 if right else 3,
                    )
                if region.found:
                    low, psi = region.q_prime_min, float(region.psi[c])
                    corner = Rectangle(
                        (low, psi), 1e9, 1.01 - psi, fill=False, hatch="////", edgecolor="0.6", linewidth=0.8
                    )
                    axes.add_patch(corner)
                    axes.vlines(low, 0.49, 1.01, color=DARK, linewidth=0.8, linestyle="--")
                held = int((one.y[y_hat == c] == c).sum())
                said, failed = "right" if c == 1 else "wrong", int((y_hat == c).sum()) - held
                axes.set_title(f"{name}, judged {said}: {held} hold (o), {failed} do not (x)")
                axes.set_xscale("symlog", linthresh=1)
                axes.set(
                    xlim=(-0.3, 1.3 * max(2.0, float(estimator.support.labels.shape[0]))), ylim=(0.49, 1.02)
                )
        figure.supxlabel("rescaled similarity q'")
        figure.supylabel("SDM(z') of the verdict")
        return _svg(figure)


def distances(estimator: SDMEstimator, sets: Mapping[str, SetComparison]) -> bytes:
    """Cumulative distribution of the distance to the nearest exemplar, for calibration's classes and every set."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.subplots()
        for c, style in enumerate(CLASS_STYLES):
            values = estimator.ecdf.of_class(c)
            axes.plot(
                *_ecdf(values), linestyle=style, color=DARK, linewidth=1.2, label=f"calibration, y = {c}"
            )
        for (name, one), (line, marker) in zip(sets.items(), SET_STYLES, strict=False):
            x, y = _ecdf(one.rows.measurement.d_nearest)
            every = max(1, len(x) // 12)
            axes.plot(
                x, y, linestyle=line, marker=marker, markevery=every, color="0.45", markersize=4,
                markerfacecolor="white", linewidth=1, label=name,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set(
            xlabel="squared distance to the nearest exemplar", ylabel="share at most so far", ylim=(0, 1.02)
        )
        axes.legend(loc="lower right")
        return _svg(figure)


def _panels(names: Sequence[str], draw: Callable[[Axes, str], None], x: str, y: str) -> bytes:
    rows = ceil(len(names) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.65 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, name in zip(grid, names, strict=False):
            draw(axes, name)
            axes.set_title(TITLES[name])
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel(x)
        figure.supylabel(y)
        return _svg(figure)


def _curve(order: Tensor, wrong: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk at every threshold, the highest first."""
    groups = torch.unique(-order, return_inverse=True)[1]
    size = torch.bincount(groups).cumsum(0)
    errors = torch.bincount(groups, weights=wrong.double()).cumsum(0)
    return (size / len(order)).numpy(), (errors / size).numpy()


def _ecdf(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = values[values.isfinite()].sort().values.clamp(min=1e-6)
    return values.numpy(), (torch.arange(1, len(values) + 1) / max(1, len(values))).numpy()


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
