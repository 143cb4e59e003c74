"""Prometheus metrics: abstentions and their reasons, the figures of verdicts, and the time of scoring.

The instruments have their own registry. vLLM keeps its `vllm:*` metrics on the process's default registry;
`/metrics` shows both. Counters and histograms start at 0 for every possible label, because a rate needs a value
before the first event, and a dashboard can then tell "none" from "unknown".

Samples of a traced request carry its trace id as an exemplar; only the OpenMetrics format shows exemplars.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from copy import copy
from itertools import product
from math import log10
from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import choose_encoder

from candor.app.answering.escalation import OUTCOMES, Outcome
from candor.app.answering.scoring import Cause
from candor.app.answering.shadow import DECISIONS, SHADOW_DECISIONS, Decision, ShadowDecision
from candor.app.store.records import LabelledVerdict
from candor.model_store.bundle import Bundle
from candor.policy.certificate import EstimatorKind
from candor.policy.decision import REGION_OF, RegionName, Verdict
from candor.policy.drift import PROMPTS_PER_FALSE_ALARM
from candor.policy.judging import TwoGates
from candor.policy.monitor import Standing, StandingName

# Buckets are finer where the calibrated accuracies lie.
_PROBABILITIES = (
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.925,
    0.95,
    0.97,
    0.98,
    0.99,
    0.995,
    0.999,
    1.0,
)
# d is uniform if answers resemble the calibration's, but the smallest quantiles matter most.
_QUANTILES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_COUNTS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_JUDGED = (
    ("high", "answered", "true"),
    ("high", "answered", "false"),
    *((region, "abstained", "false") for region in get_args(RegionName)),
)
"""Region, decision and whether a certificate covers it: as far as a verdict can have them."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All instruments of this server, labelled with one of the served models.

    exemplar: returns the trace id of the current request if it is traced, else None.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        exemplar: Callable[[], dict[str, str] | None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._exemplar = exemplar
        self._model = model_name
        self._answer_tokens = 0.0
        self._described: dict[str, list[tuple[Gauge, tuple[str, ...]]]] = {}  # gauges of each model's bundle
        label = ("model_name",)
        self._answers = Counter(
            "sdm_answers",
            "Answers that were checked, by verdict.",
            (*label, "alpha", "region", "decision", "reason"),
            registry=registry,
        )
        self._probability = Histogram(
            "sdm_probability",
            "Probability that the answer is right, by two gates; by a region, of the predicted class.",
            label,
            buckets=_PROBABILITIES,
            registry=registry,
        )
        self._distance_quantile = Histogram(
            "sdm_distance_quantile",
            "d: share of calibration points farther from the support.",
            label,
            buckets=_QUANTILES,
            registry=registry,
        )
        self._rescaled_similarity = Histogram(
            "sdm_rescaled_similarity", "q'.", label, buckets=_COUNTS, registry=registry
        )
        self._prompt_p_value = Histogram(
            "sdm_prompt_p_value",
            "p of the prompt's gate: share of calibrated prompts that lie as far out.",
            label,
            buckets=_QUANTILES,
            registry=registry,
        )
        self._tokens_saved = Counter(
            "sdm_tokens_saved",
            "Completion tokens not written: prompts refused at prefill, times the calibrated answers' mean length.",
            label,
            registry=registry,
        )
        self._scoring_duration = Histogram(
            "sdm_scoring_duration_seconds",
            "From an answer's end to its score, waiting included.",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self._scoring_failures = Counter(
            "sdm_scoring_failures",
            "Answers that could not be scored and are unavailable.",
            (*label, "cause"),
            registry=registry,
        )
        self._escalations = Counter(
            "sdm_escalations",
            "Withheld answers that another model was to give, by what came of it.",
            (*label, "outcome"),
            registry=registry,
        )
        self._escalation_duration = Histogram(
            "sdm_escalation_duration_seconds",
            "Of those that were asked: until its answer was whole, or given up.",
            label,
            buckets=(*_SECONDS, 30, 60, 120),
            registry=registry,
        )
        self._escalation_tokens = Counter(
            "sdm_escalation_tokens",
            "Tokens that the other model read and wrote, by its own count.",
            (*label, "kind"),
            registry=registry,
        )
        self._escalation_circuit = Gauge(
            "sdm_escalation_circuit",
            "Whether the other model is asked: 0 it is, 1 one request tries it again, 2 it is left alone.",
            label,
            registry=registry,
        )
        self._feedback = Counter(
            "sdm_feedback",
            "Labels that clients sent for answers given, by the verdict.",
            (*label, "region", "decision", "certified", "correct"),
            registry=registry,
        )
        certificate = (*label, "rule", "alpha")
        self._standing = Gauge(
            "sdm_certificate_standing",
            "1 for how the certificate stands after audits: upheld, suspended or renewed.",
            (*certificate, "standing"),
            registry=registry,
        )
        self._evidence = Gauge(
            "sdm_certificate_evidence",
            "log10 of the evidence against a certificate (alarm), and for it anew (renewal).",
            (*certificate, "direction"),
            registry=registry,
        )
        self._threshold = Gauge(
            "sdm_certificate_threshold", "log10 at which either is shown.", certificate, registry=registry
        )
        self._audits = Gauge(
            "sdm_certificate_audits",
            "Drawn answers that a certificate covers: right, wrong, or open, without a label.",
            (*certificate, "label"),
            registry=registry,
        )
        self._drift = Gauge(
            "sdm_prompt_drift_evidence",
            "log10 of the evidence that prompts changed, by key; of all keys where it is empty.",
            (*label, "key"),
            registry=registry,
        )
        self._drift_threshold = Gauge(
            "sdm_prompt_drift_threshold", "log10 at which it is shown.", label, registry=registry
        )
        self._reference = Gauge(
            "sdm_reference_abstention_ratio",
            "Share of answers abstained from that calibration measured.",
            (*label, "alpha"),
            registry=registry,
        )
        self._reference_ood = Gauge(
            "sdm_reference_ood_ratio",
            "Share of answers out of distribution that calibration measured on held-out prompts.",
            label,
            registry=registry,
        )
        self._shadow = Counter(
            "sdm_shadow",
            "Answers that a shadowing bundle scored too, by the decision on them (old) and its own (new).",
            (*label, "old", "new"),
            registry=registry,
        )
        self._shadow_dropped = Counter(
            "sdm_shadow_dropped",
            "Answers that a shadowing bundle did not score, for too many waited for it.",
            label,
            registry=registry,
        )
        self._bundle_info = Gauge(
            "sdm_bundle_info", "The bundle in use; always 1.", (*label, "bundle", "alpha"), registry=registry
        )
        self._support_size = Gauge(
            "sdm_support_size", "Support exemplars by label.", (*label, "label"), registry=registry
        )

    def of(self, model_name: str) -> Metrics:
        """Returns the same instruments for another model."""
        other = copy(self)
        other._model = model_name
        return other

    def expect(self, gates: TwoGates | None) -> None:
        """Says by what answers are judged that these metrics count. gates: None if a region judges."""
        self._answer_tokens = gates.terms.tokens if gates else 0.0

    def describe(self, bundle: Bundle, estimator: EstimatorKind, gates: TwoGates | None = None) -> None:
        """Sets the gauges of the bundle in place of an earlier one's, and starts counters and histograms that are new
        at 0. gates: if two gates judge."""
        for gauge, labels in self._described.pop(self._model, ()):
            gauge.remove(*labels)
        self._tokens_saved.labels(self._model)
        for alpha in bundle.manifest.alphas:
            self._set(self._bundle_info, 1, bundle.digest, str(alpha))
        reference = "reference_abstention_ratio" + ("_of_rule" if gates else "")
        if gates or estimator == "lower":  # calibration measures the abstentions of these only
            for alpha_name, ratio in bundle.report.get(reference, {}).items():
                self._set(self._reference, ratio, alpha_name)
        for label, size in Tally(one.label for one in bundle.exemplars).items():
            self._set(self._support_size, size, str(label))
        held_out = bundle.report.get("held_out", {})
        if gates:
            known = next(iter(held_out.get("rule", {}).values()), None)
            if known is not None:
                self._set(self._reference_ood, 1 - known["known"]["value"])
        elif (ood := held_out.get("ood")) is not None:
            self._set(self._reference_ood, ood["value"])
        self._begin(bundle.manifest.alphas)

    def _set(self, gauge: Gauge, value: float, *labels: str) -> None:
        gauge.labels(self._model, *labels).set(value)
        self._described.setdefault(self._model, []).append((gauge, (self._model, *labels)))

    def begin_shadow(self) -> None:
        """Starts the counters of a shadowing bundle at 0."""
        self._shadow_dropped.labels(self._model)
        for old, new in product(DECISIONS, SHADOW_DECISIONS):
            self._shadow.labels(self._model, old, new)

    def shadowed(self, decisions: tuple[Decision, ShadowDecision] | None) -> None:
        """Counts an answer that a shadowing bundle scored too, by both decisions; None: it was dropped."""
        if decisions is None:
            self._shadow_dropped.labels(self._model).inc()
        else:
            self._shadow.labels(self._model, *decisions).inc()

    def _begin(self, alphas: Iterable[float]) -> None:
        for alpha in map(str, alphas):
            self._answers.labels(self._model, alpha, "high", "answered", "none")
            for reason, region in REGION_OF.items():
                self._answers.labels(self._model, alpha, region, "abstained", reason)
        for cause in get_args(Cause):
            self._scoring_failures.labels(self._model, cause)
        for region, decision, certified in _JUDGED:
            for correct in ("true", "false"):
                self._feedback.labels(self._model, region, decision, certified, correct)
        for histogram in (
            self._probability,
            self._distance_quantile,
            self._rescaled_similarity,
            self._prompt_p_value,
            self._scoring_duration,
        ):
            histogram.labels(self._model)

    def count(self, verdict: Verdict) -> None:
        """Counts one verdict, on an answer that was given or withheld."""
        exemplar = self._exemplar()
        self._answers.labels(
            self._model,
            str(verdict.alpha),
            verdict.region,
            "abstained" if verdict.abstained else "answered",
            verdict.reason or "none",
        ).inc(exemplar=exemplar)
        if (rule := verdict.rule) is not None:
            self._prompt_p_value.labels(self._model).observe(rule.prompt_p_value, exemplar)
        if (figures := verdict.figures) is not None:
            for histogram, value in (
                (self._probability, figures.probability if rule is None else rule.probability),
                (self._distance_quantile, figures.distance_quantile),
                (self._rescaled_similarity, figures.rescaled_similarity),
            ):
                if value is not None:
                    histogram.labels(self._model).observe(value, exemplar)

    def saved(self) -> None:
        """Counts the tokens of one answer that was not written."""
        self._tokens_saved.labels(self._model).inc(self._answer_tokens)

    def scored(self, seconds: float) -> None:
        self._scoring_duration.labels(self._model).observe(seconds, self._exemplar())

    def scoring_failed(self, cause: str) -> None:
        self._scoring_failures.labels(self._model, cause).inc()

    def feedback(self, judged: LabelledVerdict, correct: bool) -> None:
        """Counts the first thumb that arrives for an answer. Those of answers let through and withheld stay apart."""
        decision = "abstained" if judged.abstained else "answered"
        flags = (str(flag).lower() for flag in (judged.covered, correct))
        self._feedback.labels(self._model, judged.region, decision, *flags).inc()

    def stands(self, rule: str, alpha: float, standing: Standing) -> None:
        """Sets how a certificate stands."""
        certificate = (self._model, rule, str(alpha))
        for name in get_args(StandingName):
            self._standing.labels(*certificate, name).set(name == standing.name)
        for direction in ("alarm", "renewal"):
            self._evidence.labels(*certificate, direction).set(getattr(standing, direction))
        self._threshold.labels(*certificate).set(standing.threshold)
        for label in ("right", "wrong", "open"):
            self._audits.labels(*certificate, label).set(getattr(standing, label))

    def drift(self, key: str, evidence: float) -> None:
        """Sets the evidence, log10, that the prompts of a key changed."""
        self._drift.labels(self._model, key).set(evidence)
        self._drift_threshold.labels(self._model).set(log10(PROMPTS_PER_FALSE_ALARM))

    def escalates(self, level: Callable[[], int]) -> None:
        """Starts the instruments of escalation at 0. level: of the circuit, asked at each scrape."""
        self._escalation_circuit.labels(self._model).set_function(level)
        self._escalation_duration.labels(self._model)
        for outcome in OUTCOMES:
            self._escalations.labels(self._model, outcome)
        for kind in ("prompt", "completion"):
            self._escalation_tokens.labels(self._model, kind)

    def escalated(self, outcome: Outcome, seconds: float | None = None) -> None:
        """Counts one answer that another model was to give. seconds: that it took; None if it was not asked."""
        self._escalations.labels(self._model, outcome).inc(exemplar=self._exemplar())
        if seconds is not None:
            self._escalation_duration.labels(self._model).observe(seconds, self._exemplar())

    def escalated_tokens(self, prompt: int | None, completion: int | None) -> None:
        """Counts what the other model says that an answer cost."""
        self._escalation_tokens.labels(self._model, "prompt").inc(prompt or 0)
        self._escalation_tokens.labels(self._model, "completion").inc(completion or 0)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Returns the page for a scraper's Accept header, and its content type.

        Names stay unescaped, since they are legal in every version: for a Prometheus before 3.0, the client library
        would rename `vllm:x` to `vllm_x` (prometheus/client_python#1177).
        """
        if "application/openmetrics-text" in accept:
            accept = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"
        else:
            accept = "text/plain"  # the client library fails on a version that is no number
        encode, content_type = choose_encoder(accept)
        return encode(_Both(self._registry, REGISTRY)), content_type


class _Both:
    """Collects from several registries as if they were one."""

    def __init__(self, *registries: CollectorRegistry) -> None:
        self._registries = dict.fromkeys(registries)  # without duplicates

    def collect(self) -> Iterable[Metric]:
        for registry in self._registries:
            yield from registry.collect()
