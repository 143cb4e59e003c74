"""The dashboards as code: what an operator watches, and the runbook beside it.

    python docker/grafana/dashboards.py [DIR]        writes docker/grafana/dashboards/*.json

Needs grafana-foundation-sdk built for Grafana 11. The JSON is committed, so that nobody needs it to look.

`candor`: three rows, after what one asks first: does it abstain as it should, is its judgement as calibrated,
does it serve well. `candor-runbook`: docs/runbook.md, a panel for each of its sections, so that every panel can
link to what its numbers mean wherever Grafana runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as d
from grafana_foundation_sdk.builders import text
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models.text import TextMode
from panels import MODEL, RUNBOOK_UID, SECTIONS, SOURCE, Panel, heat, lines, quantiles, rate

ANSWERS = "suffix: answers/s"


def main(out: Path) -> None:
    for name, board in {"candor": operations(), "runbook": runbook()}.items():
        built = json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True)
        (out / f"{name}.json").write_text(built + "\n", encoding="utf-8")


def operations() -> d.Dashboard:
    """What is watched."""
    board = _board("Candor", "candor").variables(
        [
            d.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
            d.QueryVariable("model_name")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(sdm_bundle_info, model_name)")
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(dashboard.VariableOption(text="All", value="$__all")),
        ]
    )
    board.annotation(
        d.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertname=~"Candor.*", alertstate="firing"}')
    )
    rows = {"Abstentions": abstentions(), "Calibration": calibration(), "Serving": serving()}
    number = 0
    for row, (title, panels) in enumerate(rows.items(), start=1):
        board.with_row(d.Row(title).id(100 * row))
        for panel in panels:
            number += 1
            board.with_panel(panel.id(number))
    return board


def abstentions() -> list[Panel]:
    """Does it abstain as it should?"""
    answers = "sdm_answers_total"
    reference = f"model:sdm_reference_abstention:ratio{{{MODEL}}}"
    return [
        lines(
            "Answers: given, withheld, out of distribution",
            "Answers a second by what became of them. Answered: in the region `high` and predicted to follow the "
            "instruction. Abstained: checked, and not to be relied on. Requests with mode off are not checked.",
            "Abstentions",
            {
                "answered": rate(answers, 'decision="answered"'),
                "abstained": rate(answers, 'decision="abstained", region!="ood"'),
                "ood": rate(answers, 'region="ood"'),
            },
            unit=ANSWERS,
            stacked=True,
        ),
        lines(
            "Abstention rate against its reference",
            "Share of answers abstained from. The reference is what calibration measured on held-out prompts, at the "
            "alphas that were asked for. Outside the alerts' bounds, half way to one and half way to zero, this "
            "traffic is not what the bundle was calibrated for, or the server does not judge as it was calibrated.",
            "CandorAbstentionHigh",
            {
                "{{model_name}}": f"model:sdm_abstention:ratio_rate5m{{{MODEL}}}",
                "{{model_name}}: reference": reference,
                "{{model_name}}: alert above": f"(1 + {reference}) / 2",
                "{{model_name}}: alert below": f"{reference} / 2",
            },
            unit="percentunit",
            steps={"orange": 0.9},
            share=True,
        ),
        lines(
            "Abstentions by reason",
            "Why answers were withheld. The runbook has a line on each reason.",
            "Abstentions",
            {"{{reason}}": rate(answers, 'decision="abstained"', "reason")},
            unit=ANSWERS,
            stacked=True,
        ),
        lines(
            "Out of distribution against its reference",
            "Share of answers unlike anything calibrated, over half an hour. The reference is what calibration "
            "measured on held-out prompts. Far above it, other users, another task or a changed prompt have come.",
            "CandorOutOfDistribution",
            {
                "{{model_name}}": f"model:sdm_ood:ratio_rate30m{{{MODEL}}}",
                "{{model_name}}: reference": f"model:sdm_reference_ood:ratio{{{MODEL}}}",
                "{{model_name}}: alert above": f"model:sdm_reference_ood:ratio{{{MODEL}}} + 0.15",
            },
            unit="percentunit",
            steps={"orange": 0.9},
            share=True,
        ),
        lines(
            "Budget burn",
            "How fast the 30 days' budget of answers lost to low and ood is used up: 1 uses it up in 30 days, 10 is "
            "every answer lost that calibration admitted. Negative: more is admitted than calibration measured.",
            "CandorBurnFast",
            {
                "{{model_name}}: 1 hour": f"model:sdm_burn:rate1h{{{MODEL}}}",
                "{{model_name}}: 6 hours": f"model:sdm_burn:rate6h{{{MODEL}}}",
            },
            unit="none",
            steps={"orange": 3, "red": 6},
        ),
        lines(
            "Answers that could not be scored",
            "By cause. Any is worth a look: such answers are unavailable and, in mode abstain, withheld.",
            "CandorUnavailable",
            {"{{cause}}": rate("sdm_scoring_failures_total", by="cause")},
            unit=ANSWERS,
            steps={"red": 0.001},
        ),
    ]


def calibration() -> list[Panel]:
    """Is its judgement as calibrated?"""
    return [
        heat(
            "Probability",
            "Calibrated probability that the answer is right, for every answer that was scored; by the papers' "
            "region, SDM(z') of the predicted class.",
            "Calibration",
            "sdm_probability",
            unit="percentunit",
            steps={"blue": 0.9},
        ),
        heat(
            "How far out prompts lie, p",
            "Share of calibrated prompts that lie as far out as this one. Traffic like the calibration's is spread "
            "evenly; the gate refuses what is at the bottom.",
            "Calibration",
            "sdm_prompt_p_value",
            unit="percentunit",
            steps={"blue": 0.02},
        ),
        lines(
            "Tokens not written",
            "A second: answers whose prompt was refused at the end of prefill, times the mean length of those that "
            "were calibrated.",
            "Calibration",
            {"{{model_name}}": rate("sdm_tokens_saved_total", by="model_name")},
            unit="none",
        ),
        heat(
            "Distance quantile d",
            "Share of calibration points that lie farther from the support than this answer: 1 is as near as any, "
            "0 is farther than all. Traffic like the calibration's is spread evenly.",
            "Calibration",
            "sdm_distance_quantile",
            unit="percentunit",
            steps={"blue": 0.1},
        ),
        heat(
            "Rescaled similarity q'",
            "Nearest exemplars that agree, rescaled by distance and probability. Under 1 is out of distribution.",
            "Calibration",
            "sdm_rescaled_similarity",
            unit="none",
            steps={"blue": 1},
        ),
        lines(
            "Evidence on certificates, from audits",
            "log10 of the evidence against each certificate (alarm) and for it anew (renewal). Either is shown where "
            "it reaches the threshold, whenever one looks: the certificate is then suspended, or renewed.",
            "CandorCertificateSuspended",
            {
                f"{{{{model_name}}}} {{{{alpha}}}}: {direction}": "max by (model_name, alpha) "
                f'(sdm_certificate_evidence{{{MODEL}, direction="{direction}"}})'
                for direction in ("alarm", "renewal")
            }
            | {
                "{{model_name}} {{alpha}}: threshold": "max by (model_name, alpha) "
                f"(sdm_certificate_threshold{{{MODEL}}})"
            },
            unit="none",
            steps={"red": 1.3},
        ),
        lines(
            "Audits by label",
            "Drawn answers that a certificate covers. Open ones wait for a reviewer; until then they count as right "
            "for the alarm and as wrong for the renewal.",
            "CandorCertificateSuspended",
            {
                "{{alpha}}: {{label}}": f"max by (model_name, alpha, label) (sdm_certificate_audits{{{MODEL}}})",
                "suspended": f'max(sdm_certificate_standing{{{MODEL}, standing="suspended"}})',
            },
            unit="none",
        ),
        lines(
            "Evidence that prompts changed",
            "log10, of all prompts and of each key's own, by the gate's ranks. The threshold is reached falsely no "
            "more than once in 100,000 prompts.",
            "CandorPromptDrift",
            {
                "{{model_name}}: {{key}}": f"max by (model_name, key) (sdm_prompt_drift_evidence{{{MODEL}}})",
                "{{model_name}}: threshold": f"max by (model_name) (sdm_prompt_drift_threshold{{{MODEL}}})",
            },
            unit="none",
            steps={"orange": 5},
        ),
        lines(
            "Share that clients call correct",
            "Of the last seven days' feedback, answers let through and withheld apart. Whoever sends it chose "
            "himself: it is no sample, moves no certificate, and sets off no alert.",
            "Calibration",
            {"{{model_name}}: {{decision}}": f"model_decision:sdm_feedback_accuracy:ratio7d{{{MODEL}}}"},
            unit="percentunit",
            steps={"blue": 0.9},
            share=True,
        ),
        lines(
            "Replicas by bundle",
            "Servers by the bundle they judge with. More than one bundle for longer than a rollout is a mistake.",
            "CandorBundlesDiffer",
            {
                "{{model_name}}: {{bundle}}": "count by (model_name, bundle) "
                f"(count by (model_name, bundle, instance) (sdm_bundle_info{{{MODEL}}}))"
            },
            unit="none",
            stacked=True,
        ),
        lines(
            "Support exemplars by label",
            "Labelled answers that every answer is compared with; 1 follows the instruction, 0 does not.",
            "Calibration",
            {
                "{{model_name}}: {{label}}": f"max by (model_name, label) (sdm_support_size{{{MODEL}}})",
            },
            unit="none",
        ),
    ]


def serving() -> list[Panel]:
    """Does it serve well?"""
    return [
        lines(
            "Request latency",
            "From a request's arrival in the engine to its last token.",
            "Serving",
            quantiles("vllm:e2e_request_latency_seconds"),
            unit="s",
            steps={"orange": 30},
        ),
        lines(
            "Time to first token",
            "What a reader of a stream waits for: queue and prompt.",
            "Serving",
            quantiles("vllm:time_to_first_token_seconds"),
            unit="s",
            steps={"orange": 2, "red": 10},
        ),
        lines(
            "Time between tokens",
            "How fast a stream is written once it has begun.",
            "Serving",
            quantiles("vllm:inter_token_latency_seconds"),
            unit="s",
            steps={"orange": 0.2},
        ),
        lines(
            "Tokens per second",
            "Tokens read (prompt) and written (generation), over all requests.",
            "Serving",
            {
                "prompt": rate("vllm:prompt_tokens_total"),
                "generation": rate("vllm:generation_tokens_total"),
            },
            unit="suffix: tokens/s",
        ),
        lines(
            "Queue",
            "Requests being written and requests that wait for room. A standing queue wants more replicas.",
            "Serving",
            {
                "running": f"sum(vllm:num_requests_running{{{MODEL}}})",
                "waiting": f"sum(vllm:num_requests_waiting{{{MODEL}}})",
            },
            unit="none",
            steps={"orange": 10},
        ),
        lines(
            "KV cache",
            "Share of the KV cache in use; near 1, requests wait or are preempted. Hits: prompt tokens found in it.",
            "Serving",
            {
                "in use": f"max(vllm:kv_cache_usage_perc{{{MODEL}}})",
                "prefix hits": f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}",
            },
            unit="percentunit",
            steps={"orange": 0.8, "red": 0.95},
            share=True,
        ),
        lines(
            "Scoring",
            "From an answer's end to its score, waiting included: what reliability adds to a request.",
            "Serving",
            quantiles("sdm_scoring_duration_seconds"),
            unit="s",
            steps={"orange": 0.1, "red": 1},
        ),
        lines(
            "Sequences finished, by reason",
            "stop: on its own. length: cut off, which is never calibrated. abort: the client went away. An answer "
            "whose tag has to be appended counts twice, once for the tag.",
            "Serving",
            {"{{finished_reason}}": rate("vllm:request_success_total", by="finished_reason")},
            unit="suffix: sequences/s",
            stacked=True,
        ),
        lines(
            "Preemptions",
            "Sequences put back into the queue because the KV cache was full.",
            "Serving",
            {"preemptions": rate("vllm:num_preemptions_total")},
            unit="suffix: preemptions/s",
            steps={"orange": 0.1},
        ),
        lines(
            "Shadow: decisions per second",
            "Answers that the shadowing bundle scored too, by the old bundle's decision and its own. Dropped: the "
            "machine had no time for it.",
            "The next bundle",
            {
                "{{old}}, then {{new}}": rate("sdm_shadow_total", by="old, new"),
                "dropped": rate("sdm_shadow_dropped_total"),
            },
            unit="suffix: answers/s",
        ),
        lines(
            "Escalations",
            "Withheld answers that the other model was to give, by what came of it. Circuit: 1 one request tries it "
            "again, 2 it is left alone.",
            "Escalation",
            {
                "{{outcome}}": rate("sdm_escalations_total", by="outcome"),
                "circuit": f"max(sdm_escalation_circuit{{{MODEL}}})",
            },
            unit="none",
        ),
        lines(
            "Escalation latency",
            "Until the other model's answer was whole, or given up.",
            "Escalation",
            quantiles("sdm_escalation_duration_seconds"),
            unit="s",
            steps={"orange": 30},
        ),
        lines(
            "Escalated tokens per second",
            "Tokens that the other model read (prompt) and wrote (completion), by its own count: what it costs.",
            "Escalation",
            {"{{kind}}": rate("sdm_escalation_tokens_total", by="kind")},
            unit="suffix: tokens/s",
        ),
    ]


def runbook() -> d.Dashboard:
    """docs/runbook.md, to read beside the numbers."""
    board = _board("Candor: runbook", RUNBOOK_UID)
    for number, (title, body) in enumerate(SECTIONS.items(), start=1):
        height = 4 + len(body) // 200 + body.count("\n") // 2
        panel = text.Panel().title(title).mode(TextMode.MARKDOWN).content(body)
        board.with_panel(panel.id(number).span(24).height(height))
    return board


def _board(title: str, uid: str) -> d.Dashboard:
    others = d.DashboardLink("Candor").type(dashboard.DashboardLinkType.DASHBOARDS).tags(["candor"])
    return (
        d.Dashboard(title)
        .uid(uid)
        .tags(["candor"])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(others.keep_time(True))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "dashboards")
