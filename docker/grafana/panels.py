"""What every panel has: a title, words, a unit, thresholds, and a link to the runbook's section on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import common as look
from grafana_foundation_sdk.builders import dashboard as d
from grafana_foundation_sdk.builders import heatmap, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUNBOOK_UID = "candor-runbook"
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
MODEL = 'model_name=~"$model_name"'

Panel = timeseries.Panel | heatmap.Panel
P = TypeVar("P", timeseries.Panel, heatmap.Panel)
Steps = dict[str, float]
"""Colour: value from which it holds. Under the lowest value all is well."""


def _sections(markdown: str) -> dict[str, str]:
    """Title: text, of every section that has text of its own."""
    parts = re.split(r"^#{2,3} (.+)\n", markdown, flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True) if body.strip()}


SECTIONS = _sections((Path(__file__).resolve().parents[2] / "docs/runbook.md").read_text(encoding="utf-8"))
"""The runbook's. The n-th, from 1, is panel n of its dashboard."""


def lines(
    title: str,
    description: str,
    section: str,
    queries: dict[str, str],
    *,
    unit: str,
    steps: Steps | None = None,
    stacked: bool = False,
    share: bool = False,
) -> timeseries.Panel:
    """Expressions by legend, over time. share: the axis runs from 0 to 1."""
    panel = _described(timeseries.Panel(), title, description, section, unit, steps or {})
    for letter, (legend, expression) in zip("ABCDEF", queries.items(), strict=False):
        query = Dataquery().expr(expression).legend_format(legend).range().ref_id(letter)
        panel.with_target(query.exemplar("_bucket" in expression))
    style = common.GraphThresholdsStyleMode.DASHED if steps else common.GraphThresholdsStyleMode.OFF
    panel.thresholds_style(look.GraphThresholdsStyleConfig().mode(style))
    panel.color_scheme(d.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
    panel.tooltip(look.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    legend_at = look.VizLegendOptions().placement(common.LegendPlacement.BOTTOM).show_legend(True)
    panel.legend(legend_at.display_mode(common.LegendDisplayMode.LIST))
    panel.axis_soft_min(0)
    if share:
        panel.min(0).max(1)
    if stacked:
        panel.fill_opacity(60).stacking(look.StackingConfig().mode(common.StackingMode.NORMAL))
    return panel


def heat(
    title: str, description: str, section: str, metric: str, *, unit: str, steps: Steps
) -> heatmap.Panel:
    """How a histogram's counts move over time."""
    panel = _described(heatmap.Panel(), title, description, section, unit, steps)
    expression = f"sum by (le) (increase({metric}_bucket{{{MODEL}}}[$__rate_interval]))"
    query = Dataquery().expr(expression).legend_format("{{le}}").range().ref_id("A").exemplar(True)
    return panel.with_target(query.format(PromQueryFormat.HEATMAP)).y_axis(heatmap.YAxisConfig().unit(unit))


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Events a second of a counter; by: the label to keep apart."""
    grouping = f" by ({by})" if by else ""
    selector = ", ".join(filter(None, (MODEL, labels)))
    return f"sum{grouping} (rate({metric}{{{selector}}}[$__rate_interval]))"


def quantiles(metric: str) -> dict[str, str]:
    """Median, 95 and 99 % of a histogram, by their names."""
    buckets = rate(f"{metric}_bucket", by="le")
    return {f"p{share * 100:g}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95, 0.99)}


def _described(panel: P, title: str, description: str, section: str, unit: str, steps: Steps) -> P:
    number = list(SECTIONS).index(section) + 1
    link = d.DashboardLink(f"Runbook: {section}").type(dashboard.DashboardLinkType.LINK)
    link.url(f"/d/{RUNBOOK_UID}?viewPanel={number}").target_blank(True)
    panel.title(title).description(description).links([link]).unit(unit).thresholds(_thresholds(steps))
    return panel.datasource(SOURCE).height(8).span(8)


def _thresholds(steps: Steps) -> d.ThresholdsConfig:
    well = dashboard.Threshold(value=None, color="green")
    marks = [dashboard.Threshold(value=value, color=color) for color, value in steps.items()]
    return d.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps([well, *marks])
