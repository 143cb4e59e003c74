"""The next bundle from audits: thinning and dealing, and what is made, on answers whose truth is known."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled
from candor.calibration.renew import Audited, deal, renew
from candor.engine.base import ModelIdentity, Representation
from candor.model_store.bundle import Bundle, Exemplar
from candor.model_store.manifest import Manifest
from candor.policy.certificate import RuleCertificate, RuleTerms
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.judging import TwoGates
from candor.policy.policy import Policy
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.gate import PromptGate
from candor.sdm.probe import StrangerProbe
from candor.sdm.rule import AnswerRule
from candor.sdm.score import AnswerScore

HIDDEN = 4
ALPHA = 0.9


def states(y: torch.Tensor, draw: torch.Generator, apart: float = 1.2) -> torch.Tensor:
    """h (n, 8): right answers around +apart, wrong ones around -apart in each number."""
    centre = torch.where(y == 1, apart, -apart).unsqueeze(1)
    return centre + 2.0 * torch.randn(len(y), 2 * HIDDEN, generator=draw)


def labels(n: int, base: float, draw: torch.Generator) -> torch.Tensor:
    return (torch.rand(n, generator=draw) < base).long()


@pytest.fixture(scope="module")
def old() -> Bundle:
    draw = torch.Generator().manual_seed(0)
    width = 2 * HIDDEN
    adaptor = ExemplarAdaptor(torch.zeros(width), torch.ones(width), width, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(torch.eye(width))
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]) * torch.full((1, width), 0.5 / width))
        adaptor.head.bias.zero_()
    halves = [labels(300, 0.6, draw) for _ in range(2)]
    train, calibration = ((states(y, draw), y) for y in halves)
    estimator = SDMEstimator.fit(adaptor, train, calibration, (ALPHA,))
    gate = PromptGate.fit(
        torch.randn(100, width, generator=draw),
        torch.randn(200, width, generator=draw),
        (HIDDEN, HIDDEN),
        2,
        2,
    )
    weight = torch.cat([torch.zeros(width), torch.full((width,), 1 / width), torch.zeros(4)])
    one = torch.ones((), dtype=torch.float64)
    certificate = RuleCertificate(ALPHA, ALPHA, 0.95, 0.5, 400, 200, 193, 300, 0.93)
    terms = RuleTerms("last", 0.02, 0.02, 0.95, 12.5, 0, (certificate,))
    support = estimator.support
    exemplars = tuple(
        Exemplar(f"e{i}", label, prediction, ({"role": "user", "content": f"old prompt {i}"},), "so")
        for i, (label, prediction) in enumerate(
            zip(support.labels.tolist(), support.predictions.tolist(), strict=True)
        )
    )
    manifest = Manifest(
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        model=ModelIdentity("tiny", "Tiny", HIDDEN, "float32", "d" * 64, "a" * 64, "b" * 64, "c" * 64),
        representation=Representation(),
        policy=Policy(max_tokens=16, conversations=Conversations(SystemPrompt.fixed("Be brief."))),
        alphas=(ALPHA,),
        class_names=("wrong", "right"),
        rule=terms,
        provenance={"data": "records"},
    )
    gates = TwoGates(AnswerRule(gate, AnswerScore(weight, torch.tensor(0.0), one, one)), terms)
    return Bundle(manifest, estimator, exemplars, {"fitted_prompts": ["old"]}, "0" * 64, gates)


def traffic(n: int, base: float = 0.6, seed: int = 1, share: float = 0.05, **changes: Any) -> list[Audited]:
    """n audits, all drawn with the same probability."""
    draw = torch.Generator().manual_seed(seed)
    y = labels(n, base, draw)
    h, prompts = states(y, draw), torch.randn(n, 2 * HIDDEN, generator=draw)
    return [
        replace(
            Audited(
                Labelled(
                    f"a{seed}-{i}:0",
                    f"p{seed}-{i}",
                    ({"role": "user", "content": f"new prompt {seed} {i}"},),
                    "so",
                    int(y[i]),  # type: ignore[arg-type]
                    h[i],
                    prompt_states=prompts[i],
                ),
                share,
                share,
                1.8e9 + i,
            ),
            **changes,
        )
        for i in range(n)
    ]


def test_thinning_makes_a_uniform_sample() -> None:
    """A half that was drawn four times as readily is kept as often as the other: a fourth of it."""
    readily = [replace(one, probability=0.2, least=0.05) for one in traffic(4000, seed=2)]
    rarely = [replace(one, probability=0.05, least=0.05) for one in traffic(1000, seed=3)]
    parts = deal([*readily, *rarely])
    kept = Counter(one.probability for one in parts.kept)
    assert kept[0.05] == 1000  # drawn with the least pi: all of them
    assert abs(kept[0.2] - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert len(parts.thinned_out) + len(parts.kept) == 5000
    assert abs(len(parts.certifying) - sum(kept.values()) / 2) < 4 * math.sqrt(sum(kept.values()) / 4)


def test_lots_look_at_nothing_but_names() -> None:
    audits = traffic(300)
    turned = [replace(one, answer=replace(one.answer, label=1 - one.answer.label)) for one in audits]
    first, second = deal(audits), deal(turned[::-1])
    for part in ("certifying", "measuring", "teaching"):
        names = [{one.answer.id for one in getattr(parts, part)} for parts in (first, second)]
        assert names[0] == names[1]
    other = deal(audits, seed=1)
    assert {one.answer.id for one in other.certifying} != {one.answer.id for one in first.certifying}


def test_all_drawn_alike_are_all_kept() -> None:
    assert deal(traffic(200)).thinned_out == []


def test_a_bundle_comes_of_audits(old: Bundle) -> None:
    audits = traffic(1200)
    made = renew(old, audits)
    assert made.manifest.rule is not None
    (certificate,) = made.manifest.rule.certificates
    parts = deal(audits)
    assert certificate.records == len(parts.certifying)
    assert certificate.accuracy == ALPHA
    assert certificate.lower_bound >= ALPHA
    lineage = made.manifest.provenance["lineage"]
    assert lineage["parent"] == old.digest
    assert (lineage["audits"], lineage["certifying"]) == (1200, len(parts.certifying))
    assert lineage["from"] == "2027-01-15T08:00:00+00:00"
    assert made.manifest.provenance["before"] == {"data": "records"}
    cells = made.report["recalibration"]["decisions"][str(ALPHA)]
    assert sum(one["records"] for one in cells.values()) == certificate.records
    answered = sum(cells[f"{was}, then answered"]["records"] for was in ("answered", "abstained"))
    right = sum(cells[f"{was}, then answered"]["right"] for was in ("answered", "abstained"))
    assert (answered, right) == (certificate.answered, certificate.right)
    assert old.digest[:12] in made.said


def test_what_certifies_fits_nothing(old: Bundle) -> None:
    """Other states and labels of what certifies change neither weights nor gates nor support."""
    audits = traffic(1200)
    certifying = {one.answer.id for one in deal(audits).certifying}
    turned = [
        replace(
            one, answer=replace(one.answer, h=one.answer.h + 0.01, label=one.answer.label if i % 40 else 0)
        )
        if one.answer.id in certifying
        else one
        for i, one in enumerate(audits)
    ]
    assert turned != audits
    first, second = renew(old, audits), renew(old, turned)
    assert first.rule is not None
    assert second.rule is not None
    assert torch.equal(first.rule.score.weight, second.rule.score.weight)
    assert torch.equal(first.rule.gate.reference, second.rule.gate.reference)
    assert torch.equal(first.estimator.support.h_prime, second.estimator.support.h_prime)
    assert not certifying & {one.id for one in first.exemplars}


def test_the_support_grows_and_what_was_labelled_anew_is_replaced(old: Bundle) -> None:
    again = Labelled("again:0", "", old.exemplars[7].messages, "so", 0, torch.full((2 * HIDDEN,), -1.0))
    from candor.calibration.data import prompt_digest

    again = replace(again, prompt_digest=prompt_digest(again.messages))
    made = renew(old, traffic(1200), [again])
    assert made.report["recalibration"]["support"]["replaced"] == 1
    assert "e7" not in {one.id for one in made.exemplars}
    last = made.exemplars[-1]
    assert (last.id, last.label, last.prediction) == ("again:0", 0, 0)
    assert len(made.exemplars) == len(made.estimator.support)
    assert torch.equal(made.estimator.support.h_prime[-1], torch.full((2 * HIDDEN,), -1.0))
    assert torch.equal(made.estimator.support.h_prime[:7], old.estimator.support.h_prime[:7])


def test_without_texts_the_support_stays(old: Bundle) -> None:
    audits = [replace(one, answer=replace(one.answer, messages=())) for one in traffic(1200)]
    made = renew(old, audits)
    assert torch.equal(made.estimator.support.h_prime, old.estimator.support.h_prime)
    assert [one.id for one in made.exemplars] == [one.id for one in old.exemplars]


def test_unlabelled_audits_count_as_wrong(old: Bundle) -> None:
    audits = traffic(1200)
    open_ = [
        replace(one, answer=replace(one.answer, label=0, unknown=True)) if i % 5 == 0 else one
        for i, one in enumerate(audits)
    ]
    with pytest.raises(CalibrationError, match="nothing can be certified"):
        renew(old, open_)  # a fifth without a label, so no more than 0.8 of any can be right


def test_unwritten_answers_count_as_wrong_where_the_new_gate_knows_the_prompt(old: Bundle) -> None:
    def unwritten(audits: list[Audited], shift: float) -> list[Audited]:
        return [
            replace(
                one,
                unwritten=True,
                answer=replace(
                    one.answer,
                    h=torch.empty(0),
                    fault="incomplete",
                    label=0,
                    unknown=True,
                    prompt_states=one.answer.prompt_states + shift,
                ),
            )
            for one in audits
        ]

    audits = traffic(1200)
    assert renew(
        old, [*audits, *unwritten(traffic(300, seed=5), 100.0)]
    ).manifest.rule  # far out: refused again
    with pytest.raises(CalibrationError, match="nothing can be certified"):
        renew(old, [*audits, *unwritten(traffic(300, seed=5), 0.0)])


def test_a_probe_is_kept_and_measured_anew(old: Bundle) -> None:
    assert old.rule is not None
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(2 * HIDDEN, generator=draw)
    probe = StrangerProbe.fit(weight, torch.randn(50, 2 * HIDDEN, generator=draw), 1)
    gates = replace(old.rule, rule=replace(old.rule.rule, probe=probe))
    made = renew(replace(old, rule=gates), traffic(1200))
    assert made.rule is not None
    assert made.rule.probe is not None
    assert torch.equal(made.rule.probe.weight, weight)
    assert len(made.rule.probe.reference) == len(made.rule.gate.reference)


@pytest.mark.parametrize(("audits", "said"), [(0, "no audit"), (60, "too few labels")])
def test_too_few_are_refused(old: Bundle, audits: int, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        renew(old, traffic(audits))


def test_hopeless_answers_are_refused_with_the_figures(old: Bundle) -> None:
    with pytest.raises(CalibrationError, match=r"nothing can be certified on these audits.*\n.*alpha 0\.9"):
        renew(old, traffic(600, base=0.1))


def test_false_certificates_are_rare(old: Bundle) -> None:
    """Audits drawn by doubt, of answers whose states say nothing: no threshold holds .9, any certificate is false."""
    false = 0
    for seed in range(100, 120):
        draw = torch.Generator().manual_seed(seed)
        audits = []
        for number, one in enumerate(traffic(400, base=0.885, seed=seed)):
            h = 2.0 * torch.randn(2 * HIDDEN, generator=draw)
            audits.append(replace(one, answer=replace(one.answer, h=h), probability=(0.05, 0.07)[number % 2]))
        try:
            renew(old, audits)
        except CalibrationError:
            continue
        false += 1
    assert false <= 4  # at most 1 is expected at delta = .05; P(5 or more) < .003
