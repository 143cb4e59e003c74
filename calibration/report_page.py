"""The report for a person who has ten minutes: one HTML file in black and white, without a script or another host.

    first screen     what it does, in words and three figures: answered, right, promised
    below            risk against coverage; what is let through by kind of prompt; the surest mistakes with their
                     nearest exemplars; near and far strangers; what holds it back

It reads a published bundle and the answers to held-out prompts, and fits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import torch
from torch import Tensor

from candor.calibration.data import Record
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share
from candor.calibration.served import Attempts
from candor.model_store.bundle import Bundle, Exemplar
from candor.policy.certificate import Certificate, RuleCertificate
from candor.policy.judging import certificate_at, judge, judge_by_rule

MISTAKES = 20
EXEMPLARS = 2
_MOST_KINDS = 12
_FIRST = 20
"""Answers from which on the curve of risk is drawn: among fewer, a share says little."""
_WIDTH, _HEIGHT = 640, 240


@dataclass(frozen=True, eq=False)
class JudgedSet:
    """First attempts at one set's prompts, judged at alpha. score, known, answered, right: (n,), bool but the first,
    which is -inf where nothing could be scored. h_prime: (n, M)."""

    answers: Sequence[Labelled]
    score: Tensor
    known: Tensor
    answered: Tensor
    right: Tensor
    h_prime: Tensor

    @classmethod
    def of(cls, bundle: Bundle, answers: Sequence[Labelled], alpha: float) -> JudgedSet:
        """By the two gates, or by the region under the lower estimator where there are none."""
        first = Attempts.measure(bundle.estimator, answers).first(1)
        calibrated, known = first.scored.flatten(), torch.ones(len(answers), dtype=torch.bool)
        if bundle.rule is None:
            judged = judge(bundle.estimator, first.measurement, alpha, "lower", calibrated=calibrated)
            score = judged.estimate.sdm[:, 1]
        else:
            judged = judge_by_rule(
                bundle.estimator,
                bundle.rule,
                first.measurement,
                first.h,
                first.prompts,
                alpha,
                calibrated=calibrated,
            )
            assert judged.rule is not None  # `judge_by_rule` makes one
            known, score = judged.rule.known, judged.rule.score
        score = torch.where(calibrated & known & score.isfinite(), score.double(), -torch.inf)
        return cls(
            answers, score, known, judged.decisions.follows, first.y[:, 0] == 1, first.measurement.h_prime
        )

    @property
    def share_answered(self) -> Share:
        return Share.count(self.answered)

    @property
    def share_right(self) -> Share:
        """Of what is let through."""
        return Share.count(self.right[self.answered])


@dataclass(frozen=True)
class Row:
    """A line of a table: what is let through of one kind of prompt, or of one set."""

    name: str
    prompts: int
    right: Share
    known: Share
    answered: Share
    right_if_answered: Share

    @classmethod
    def of(cls, name: str, judged: JudgedSet, rows: Tensor) -> Row:
        """rows: (n,) bool."""
        return cls(
            name,
            int(rows.sum()),
            Share.count(judged.right[rows]),
            Share.count(judged.known[rows]),
            Share.count(judged.answered[rows]),
            Share.count(judged.right[rows & judged.answered]),
        )


@dataclass(frozen=True)
class Mistake:
    prompt: str
    response: str
    reference: str | None
    passed: bool
    neighbours: tuple[tuple[float, Exemplar], ...]


def page(
    bundle: Bundle,
    held_out: Sequence[Labelled],
    records: Mapping[str, Record],
    others: Mapping[str, Sequence[Labelled]] | None = None,
    kind: str | None = None,
) -> str:
    """The whole document.

    held_out: answers that the bundle was not made from. records: theirs, by prompt digest. others: further sets by
    name, such as strangers. kind: a column of the records by which prompts are told apart; None: their length.
    """
    alpha = _alpha(bundle)
    seen = JudgedSet.of(bundle, held_out, alpha)
    certificate = _certificate(bundle, alpha)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "interval": _interval, "short": _short}
    return environment.from_string(_TEMPLATE).render(
        bundle=bundle,
        alpha=alpha,
        seen=seen,
        certificate=certificate,
        curve=_curve(seen),
        others=[
            (one, _certificate(bundle, one), JudgedSet.of(bundle, held_out, one))
            for one in bundle.manifest.alphas
        ],
        kinds=_by_kind(seen, records, kind),
        by=f"by {kind}" if kind else "by length",
        mistakes=_mistakes(bundle, seen, records),
        sets=[
            Row.of(name, one, torch.ones(len(one.answers), dtype=torch.bool))
            for name, one in {
                "held out": seen,
                **{name: JudgedSet.of(bundle, some, alpha) for name, some in (others or {}).items()},
            }.items()
        ],
        advice=bundle.report.get("advice") or {},
        first=_FIRST,
    )


def _alpha(bundle: Bundle) -> float:
    """The highest alpha at which anything is promised, else found, else the lowest."""
    alphas = sorted(bundle.manifest.alphas, reverse=True)
    promised = [alpha for alpha in alphas if _certificate(bundle, alpha) is not None]
    found = [alpha for alpha in alphas if bundle.rule is None and bundle.regions[alpha].found]
    return (promised or found or alphas[-1:])[0]


def _certificate(bundle: Bundle, alpha: float) -> Certificate | RuleCertificate | None:
    if bundle.rule is not None:
        return bundle.rule.terms.at(alpha)
    return certificate_at(bundle.certificates, alpha, "lower")


def _by_kind(seen: JudgedSet, records: Mapping[str, Record], kind: str | None) -> list[Row]:
    """The commonest kinds first; of lengths, the shortest third of the prompts first."""
    if kind is None:
        words = torch.tensor([len(one.prompt.split()) for one in seen.answers])
        cuts = [int(words.double().quantile(q)) for q in (1 / 3, 2 / 3)]
        names = (f"up to {cuts[0]} words", f"up to {cuts[1]}", f"more than {cuts[1]}")
        third = torch.bucketize(words, torch.tensor(cuts))
        rows = [Row.of(name, seen, third == index) for index, name in enumerate(names)]
        return [row for row in rows if row.prompts]
    named = [str(records[one.prompt_digest].row.get(kind, "-")) for one in seen.answers]
    rows = [Row.of(name, seen, torch.tensor([one == name for one in named])) for name in set(named)]
    return sorted(rows, key=lambda row: (-row.prompts, row.name))[:_MOST_KINDS]


def _mistakes(bundle: Bundle, seen: JudgedSet, records: Mapping[str, Record]) -> list[Mistake]:
    """Wrong answers with the highest scores, each beside the exemplars that are nearest to it by h'."""
    order = seen.score.argsort(descending=True, stable=True).tolist()
    wrong = [i for i in order if not seen.right[i] and seen.score[i].isfinite()][:MISTAKES]
    distances = torch.cdist(seen.h_prime[wrong], bundle.estimator.support.h_prime)
    found = []
    for i, row in zip(wrong, distances, strict=True):
        near, at = row.topk(min(EXEMPLARS, len(row)), largest=False)
        one, record = seen.answers[i], records.get(seen.answers[i].prompt_digest)
        reference = None if record is None or record.reference is None else _reference(record.reference)
        neighbours = tuple(
            (float(d), bundle.exemplars[j]) for d, j in zip(near.tolist(), at.tolist(), strict=True)
        )
        found.append(Mistake(one.prompt, one.response, reference, bool(seen.answered[i]), neighbours))
    return found


def _reference(reference: object) -> str:
    """Of a choice, the right one."""
    return str(reference.get("answer", reference) if isinstance(reference, Mapping) else reference)


def _curve(seen: JudgedSet) -> str:
    """Risk against coverage as SVG: the share of wrong answers among those with the highest scores.

    The dashed line is the share of wrong answers to all; the circle is what is let through.
    """
    wrong = (~seen.right)[seen.score.argsort(descending=True, stable=True)].double()
    n = len(wrong)
    scored = int(seen.score.isfinite().sum())
    risk = (wrong.cumsum(0) / torch.arange(1, n + 1)).tolist()
    everything = risk[-1]
    highest = max(0.02, 1.15 * max(everything, *risk[min(_FIRST, n) - 1 : max(scored, 1)]))
    left, right, top, bottom = 48, _WIDTH - 12, 10, _HEIGHT - 34

    def point(coverage: float, share: float) -> tuple[float, float]:
        return left + coverage * (right - left), bottom - share / highest * (bottom - top)

    step = max(1, n // 400)
    drawn = [
        point((i + 1) / n, risk[i]) for i in range(_FIRST - 1, scored) if i % step == 0 or i == scored - 1
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Risk against coverage">',
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#000"/>',
        f'<polyline points="{line}" fill="none" stroke="#000" stroke-width="2"/>',
    ]
    _, level = point(0, everything)
    parts.append(
        f'<line x1="{left}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" stroke="#000" stroke-dasharray="4 4"/>'
        f'<text x="{left + 6}" y="{level - 5:.1f}">everything answered: {everything:.1%} wrong</text>'
    )
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = point(share, 0)
        anchor = "end" if share == 1 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="{anchor}">{share:.0%}</text>')
    for share in (0.0, highest / 2, highest):
        x, y = point(0, share)
        parts.append(f'<text x="{x - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{share:.1%}</text>')
    through = int(seen.answered.sum())
    if through:
        share = float((~seen.right)[seen.answered].double().mean())
        x, y = point(through / n, share)
        anchor, dx = ("end", -9) if x > _WIDTH / 2 else ("start", 9)
        dy = 18 if dx > 0 and y < bottom - 24 else -8  # the line rises to the right
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#fff" stroke="#000" stroke-width="2"/>'
            f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">let through: {through / n:.1%}, '
            f"of which {share:.1%} wrong</text>"
        )
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">share answered</text></svg>')
    return "".join(parts)


def _percent(share: Share) -> str:
    return "-" if share.value is None else f"{share.value:.1%}"


def _interval(share: Share) -> str:
    return "" if share.low is None or share.high is None else f"[{share.low:.1%}, {share.high:.1%}]"


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ bundle.manifest.name }}: what it answers, and how right that is</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #000; background: #fff; max-width: 54rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.figures div { flex: 1 1 12rem; border: 2px solid #000; padding: .75rem 1rem; }
.figures b { display: block; font-size: 2.4rem; line-height: 1.2; } .figures span { display: block; }
small, .note { font-size: .85rem; } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } caption { text-align: left; }
th, td { border-bottom: 1px solid #000; padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
blockquote { margin: .2rem 0; padding-left: .8rem; border-left: 3px solid #000; white-space: pre-wrap;
  overflow-wrap: anywhere; }
ol.mistakes > li { margin-bottom: 1.2rem; } dl { margin: .3rem 0; display: grid; grid-template-columns: 8rem 1fr; }
dt { font-size: .85rem; } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
</style>
</head>
<body>
<main>
<h1>{{ bundle.manifest.name }}</h1>
{% set answered = seen.share_answered %}
{% set right = seen.share_right %}
{% if answered.hits %}
<p>Of {{ answered.of }} questions kept apart, {{ answered.hits }} were answered and
{{ answered.of - answered.hits }} withheld. {{ right.hits }} of the {{ right.of }} answers were right. Had everything
been answered, {{ seen.right.sum().item() }} of {{ answered.of }} would have been.
{% else %}
<p>Nothing is let through: of {{ answered.of }} questions kept apart all were withheld. Had everything been answered,
{{ seen.right.sum().item() }} would have been right.
{% endif %}
{% if certificate %}
Promised, with confidence {{ "%.0f%%" | format(100 * certificate.confidence) }}: of what is let through, at least
{{ "%g%%" | format(100 * certificate.accuracy) }} is right. The promise is for questions drawn as those of
{{ bundle.manifest.provenance.data.file or "the calibration" }} were, put to this model in this way, and held to the
same verifier. It was tested on {{ certificate.records }} questions used for nothing else:
{{ certificate.right }} right of {{ certificate.answered }}.
{% else %}
Nothing is promised: no certificate was issued.
{% endif %}</p>
<div class="figures">
<div><span>answered</span><b>{{ answered | percent }}</b><small>{{ answered | interval }}</small></div>
<div><span>right, of these</span><b>{{ right | percent }}</b><small>{{ right | interval }}</small></div>
<div><span>promised</span><b>
{%- if certificate %}{{ "%g%%" | format(100 * certificate.accuracy) }}{% else %}nothing{% endif %}</b>
<small>at alpha {{ alpha }}; intervals are 95%</small></div>
</div>
<h2>Risk against coverage</h2>
{{ curve | safe }}
<p class="note">Answers are let through from the highest score down; drawn from the {{ first }}th on. The circle is
where this bundle stops.</p>
{% if others | length > 1 %}
<div class="wide"><table>
<tr><th>at alpha</th><th class="n">promised</th><th class="n">let through</th><th class="n">right of these</th></tr>
{% for other, promise, row in others %}
<tr><td>{{ other }}</td>
<td class="n">{% if promise %}{{ "%g%%" | format(100 * promise.accuracy) }}{% else %}nothing{% endif %}</td>
<td class="n">{{ row.share_answered | percent }}<br><small>{{ row.share_answered | interval }}</small></td>
<td class="n">{{ row.share_right | percent }}<br><small>{{ row.share_right | interval }}</small></td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>What is let through, {{ by }}</h2>
<div class="wide"><table>
<tr><th>prompts</th><th class="n">number</th><th class="n">right of all</th><th class="n">let through</th>
<th class="n">right of these</th></tr>
{% for row in kinds %}
<tr><td>{{ row.name }}</td><td class="n">{{ row.prompts }}</td><td class="n">{{ row.right | percent }}</td>
<td class="n">{{ row.answered | percent }}<br><small>{{ row.answered | interval }}</small></td>
<td class="n">{{ row.right_if_answered | percent }}<br><small>{{ row.right_if_answered | interval }}</small></td></tr>
{% endfor %}
</table></div>
<p class="note">The promise is about all questions together, not about each kind.</p>
<h2>Strangers</h2>
<div class="wide"><table>
<tr><th>set</th><th class="n">prompts</th><th class="n">right of all</th>
<th class="n">known to the first gate</th><th class="n">let through</th><th class="n">right of these</th></tr>
{% for row in sets %}
<tr><td>{{ row.name }}</td><td class="n">{{ row.prompts }}</td><td class="n">{{ row.right | percent }}</td>
<td class="n">{% if bundle.rule %}{{ row.known | percent }}{% else %}-{% endif %}</td>
<td class="n">{{ row.answered | percent }}<br><small>{{ row.answered | interval }}</small></td>
<td class="n">{{ row.right_if_answered | percent }}<br><small>{{ row.right_if_answered | interval }}</small></td></tr>
{% endfor %}
</table></div>
{% if sets | length == 1 %}
<p class="note">No strangers were asked about: <code>candor evaluate --shifted FILE --ood FILE --near FILE</code>
measures them.</p>
{% endif %}
{% if advice.holds_back or advice.helps %}
<h2>What holds it back, and what may help</h2>
{% if bundle.rule %}<p class="note">Of the layer and its region, whatever the two gates let through.</p>{% endif %}
<ul>
{% for one in advice.holds_back %}<li>{{ one }}</li>
{% endfor %}
{% for one in advice.helps %}<li>May help: {{ one }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>The surest mistakes</h2>
<p class="note">Wrong answers with the highest scores, and the calibrated answers that are most like them.</p>
<ol class="mistakes">
{% for one in mistakes %}
<li><strong>{{ "let through" if one.passed else "withheld" }}</strong>
<blockquote>{{ one.prompt | short }}</blockquote>
<dl><dt>answer</dt><dd>{{ one.response | short }}</dd>
{% if one.reference is not none %}<dt>reference</dt><dd>{{ one.reference | short }}</dd>{% endif %}
{% for distance, near in one.neighbours %}
<dt>like ({{ "%.3g" | format(distance) }})</dt>
<dd>{{ near.prompt | short(240) }} -> {{ near.response | short(120) }}
({{ "right" if near.label == 1 else "wrong" }})</dd>
{% endfor %}
</dl></li>
{% endfor %}
</ol>
{% if not mistakes %}<p>None: every scored answer was right.</p>{% endif %}
<p class="note">Bundle {{ bundle.digest[:16] }}, made {{ bundle.manifest.created }}; model
{{ bundle.manifest.model.name }}.</p>
</main>
</body>
</html>
"""
