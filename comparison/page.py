"""The comparison as one self-contained HTML page: figures are embedded, with no script and no other host."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2

from candor.comparison import figures
from candor.comparison.comparators import COMPARATORS, REFERENCE, SAMPLERS
from candor.comparison.compare import TITLES, Comparison, SetComparison
from candor.comparison.tables import Table, cost_table, heading, tables
from candor.model_store.bundle import Bundle, Exemplar

MISTAKES = 8
EXEMPLARS = 3


@dataclass(frozen=True)
class Neighbour:
    distance: float
    exemplar: Exemplar


@dataclass(frozen=True)
class Mistake:
    """A wrong verdict, and the exemplars that it was judged by."""

    prompt: str
    response: str
    label: int
    verdict: int
    sdm: float
    q_prime: float
    d: float
    region: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Picture:
    """svg: base64 data for an img. alt: a description in words."""

    title: str
    caption: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Section:
    """The page's section about one set."""

    name: str
    heading: str
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    mistakes: tuple[Mistake, ...]


def page(bundle: Bundle, comparison: Comparison) -> str:
    """The whole document."""
    sampled = [
        (heading(name, one), [*_sampled_tables(comparison, name, one)])
        for name, one in comparison.sampled.items()
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        manifest=bundle.manifest,
        digest=bundle.digest,
        comparison=comparison,
        methods=[
            *((one.title, one.source) for one in COMPARATORS.values()),
            *((one.title, one.source) for one in SAMPLERS.values()),
        ],
        reference=TITLES[REFERENCE],
        overview=_overview(comparison),
        sections=[_section(bundle, comparison, name, one) for name, one in comparison.sets.items()],
        sampled=sampled,
    )


def mistakes(bundle: Bundle, one: SetComparison, alpha: float) -> tuple[Mistake, ...]:
    """The wrong verdicts of the bundle's layer, highest SDM(z') first."""
    estimate = bundle.estimator.judge(one.rows.measurement, alpha)
    top = estimate.sdm.gather(1, estimate.y_hat.unsqueeze(1)).squeeze(1)
    wrong = (estimate.y_hat != one.y).nonzero().flatten()
    chosen = wrong[top[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    far, near = bundle.estimator.nearest(one.rows.h[chosen], min(EXEMPLARS, len(bundle.exemplars)))
    found = []
    for place, row in enumerate(chosen.tolist()):
        answer = one.answers[row]
        neighbours = tuple(
            Neighbour(distance, bundle.exemplars[index])
            for distance, index in zip(far[place].tolist(), near[place].tolist(), strict=True)
            if index >= 0
        )
        found.append(
            Mistake(
                answer.prompt,
                answer.response,
                answer.label,
                int(estimate.y_hat[row]),
                float(top[row]),
                float(estimate.q_prime[row]),
                float(estimate.d[row]),
                "high" if estimate.admitted_lower[row] else "ood" if estimate.is_ood[row] else "low",
                neighbours,
            )
        )
    return tuple(found)


def _overview(comparison: Comparison) -> list[Picture]:
    estimator, sets = comparison.fitting.estimator, comparison.sets
    alpha = comparison.fitting.alphas[0]
    found = "hatched: the region" if estimator.regions[alpha].found else "there is no region"
    return [
        _picture(
            f"Similarity against probability, alpha = {alpha}",
            f"Every scored answer. Circles: the verdict holds; crosses: it does not; {found} (plain estimator), with "
            "the least q' dashed.",
            figures.plane(estimator, sets, alpha),
        ),
        _picture(
            "Distances",
            "How far answers lie from the nearest exemplar. A set to the right of both calibration curves is unlike "
            "what was calibrated.",
            figures.distances(estimator, sets),
        ),
    ]


def _section(bundle: Bundle, comparison: Comparison, name: str, one: SetComparison) -> Section:
    pictures = (
        _picture(
            f"{name}: risk and coverage",
            f"Black: the method of the panel; dotted: {TITLES[REFERENCE]}; grey: all others; thin line: 5 % risk.",
            figures.risk_coverage(one),
        ),
        _picture(
            f"{name}: reliability",
            "Circles: bins of the probability that the verdict holds, larger with more answers; lines: exact "
            "95 % intervals. On the diagonal the probability is what it says.",
            figures.reliability(one),
        ),
    )
    return Section(
        name,
        heading(name, one),
        pictures,
        tuple(tables(comparison, name, one)),
        mistakes(bundle, one, comparison.fitting.alphas[0]),
    )


def _sampled_tables(comparison: Comparison, name: str, one: SetComparison) -> Iterator[Table]:
    yield cost_table(name, one)
    yield from tables(comparison, name, one)


def _picture(title: str, caption: str, svg: bytes) -> Picture:
    return Picture(title, caption, f"{title}. {caption}", b64encode(svg).decode())


TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ manifest.name }}: comparison</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 68rem; margin: 2rem auto;
         padding: 0 1rem; }
  h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; }
  figure { margin: 1rem 0; }
  figure img { width: 100%; height: auto; }
  figcaption, .note { color: #444; font-size: .9em; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .82em; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #ccc; vertical-align: top; }
  th:first-child, td:first-child { text-align: left; white-space: nowrap; }
  td .interval { display: block; color: #555; font-size: .85em; white-space: nowrap; }
  td.best { font-weight: 700; text-decoration: underline; }
  td.best .interval { font-weight: 400; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .4rem .6rem; background: #f3f3f3;
        font-size: .85em; }
  details { border: 1px solid #ccc; padding: .4rem .7rem; margin: .4rem 0; }
  summary { cursor: pointer; }
  nav a { margin-right: 1rem; }
  @media print { body { max-width: none; margin: 0; } details { break-inside: avoid; } }
</style>
</head>
<body>
{% macro picture(one) %}
<figure>
  <img src="data:image/svg+xml;base64,{{ one.svg }}" alt="{{ one.alt }}">
  <figcaption><strong>{{ one.title }}.</strong> {{ one.caption }}</figcaption>
</figure>
{% endmacro %}
{% macro grid(table) %}
<h3>{{ table.title }}</h3>
<p class="note">{{ table.note }}</p>
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}">
<table>
  <thead><tr><th scope="col">method</th>
  {% for title in table.header %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
  <tbody>
  {% for title, cells in table.rows %}
  <tr><th scope="row">{{ title }}</th>
  {% for cell in cells %}
  <td{% if cell.best %} class="best"{% endif %}>{{ cell.value }}
    {%- if cell.interval %}<span class="interval">{{ cell.interval }}</span>{% endif %}</td>
  {% endfor %}</tr>
  {% endfor %}
  </tbody>
</table>
</div>
{% endmacro %}
<h1>{{ manifest.name }}: comparison</h1>
<p>Bundle <code>{{ digest[:12] }}</code> of {{ manifest.created }} for {{ manifest.model.name }}. Every method is
fitted on the bundle's own halves ({{ comparison.fitting.training | length }} answers to train on,
{{ comparison.fitting.calibration | length }} to calibrate) and judges the same answers from the same hidden states.
Best values are underlined. Differences are to {{ reference }}, which is what is served.</p>
<nav>{% for one in sections %}<a href="#{{ one.name }}">{{ one.name }}</a>{% endfor %}
{% if sampled %}<a href="#again">asking again</a>{% endif %}<a href="#methods">methods</a></nav>
{% for one in overview %}{{ picture(one) }}{% endfor %}
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.heading }}</h2>
{% for one in section.pictures %}{{ picture(one) }}{% endfor %}
{% for table in section.tables %}{{ grid(table) }}{% endfor %}
<h3>{{ section.name }}: the most confident mistakes</h3>
<p class="note">Verdicts of the bundle's layer that do not hold, the highest SDM(z') first, with the exemplars nearest
to them.</p>
{% for one in section.mistakes %}
<details>
  <summary>SDM {{ "%.3f" | format(one.sdm) }}, q' {{ "%.1f" | format(one.q_prime) }}, d {{ "%.3f" | format(one.d) }},
  region {{ one.region }}: judged {{ "right" if one.verdict == 1 else "wrong" }}, is
  {{ "right" if one.label == 1 else "wrong" }}</summary>
  <pre>{{ one.prompt }}</pre>
  <pre>{{ one.response }}</pre>
  {% for near in one.neighbours %}
  <p class="note">Exemplar at squared distance {{ "%.2f" | format(near.distance) }}: label {{ near.exemplar.label }},
  predicted {{ near.exemplar.prediction }}</p>
  <pre>{{ near.exemplar.prompt }}
{{ near.exemplar.response }}</pre>
  {% endfor %}
</details>
{% else %}
<p>None.</p>
{% endfor %}
{% endfor %}
{% if sampled %}
<h2 id="again">Methods that ask the model again</h2>
<p>On a random part of each set, with every other method on the same prompts.</p>
{% for title, several in sampled %}
<h3>{{ title }}</h3>
{% for table in several %}{{ grid(table) }}{% endfor %}
{% endfor %}
{% endif %}
<h2 id="methods">Methods</h2>
<ul>{% for title, source in methods %}<li>{{ title }}: {{ source }}</li>{% endfor %}</ul>
</body>
</html>
"""
