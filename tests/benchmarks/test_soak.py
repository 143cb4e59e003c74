"""The soak's figures: a slope by hand, and every kind of trouble makes it fail."""

from __future__ import annotations

import pytest

from benchmarks.soak import Exchange, Sample, growth, summary
from benchmarks.stability import differences


def sample(at: float, size: int, files: int = 10) -> Sample:
    return at, int(2 * at), {"http": size}, files


def test_growth_by_hand() -> None:
    rising = [sample(t, 1000 + 6 * t) for t in range(60)]  # two requests and six bytes a second
    assert growth(rising, "http") == pytest.approx((3, 0))
    # What is loaded in the first third is not a leak.
    assert growth([sample(t, 10**9 if t > 20 else 0) for t in range(90)], "http") == (0, 0)
    assert growth([sample(0, 1)], "http") is None
    # A jump says little of a slope: the interval holds 0.
    slope, half = growth([sample(t, 10**6 if t > 40 else 0) for t in range(60)], "http") or (0, 0)
    assert 0 < slope < half


def record() -> Exchange:
    made = Exchange(samples=[sample(t, 1 << 20) for t in range(60)])
    made.asked["whole", "200"] = 5
    made.asked["wrong", "400"] = 1
    made.asked["left amid", "left"] = 2
    made.verdicts["p"] = [(at, "high", 1, "a") for at in (1.0, 30.0, 50.0)]
    made.answered_at = [1.0, 2.0, 3.0, 50.0]
    return made


def test_nothing_wrong() -> None:
    figures, faults = summary(record(), 60)
    assert faults == []
    assert (figures["answers_per_s_first_third"], figures["answers_per_s_last_third"]) == (0.15, 0.05)
    assert (figures["requests"], figures["fixed_prompts_asked"]) == (8, 3)


def test_a_verdict_that_fell_otherwise_once_is_listed() -> None:
    made = record()
    made.verdicts["p"] += [(2.0, "high", 1, "a"), (3.0, "low", 0, "b")]
    figures, faults = summary(made, 60)
    assert faults == []
    varied = {"('high', 1, 'a')": [2, 1, 1], "('low', 0, 'b')": [1, 0, 0]}
    assert figures["fixed_prompts_that_varied"] == {"p": varied}


@pytest.mark.parametrize("trouble", ["failed", "accepted", "changed", "files", "memory"])
def test_something_wrong(trouble: str) -> None:
    made = record()
    if trouble == "failed":
        made.asked["stream", "500"] += 1
    elif trouble == "accepted":
        made.asked["wrong", "200"] += 1
    elif trouble == "changed":
        made.verdicts["p"] += [(at, "low", 1, "a") for at in (52.0, 54.0)]
    elif trouble == "memory":
        made.samples = [sample(t, (1 << 20) + 4096 * t) for t in range(60)]
    else:
        made.samples.append(sample(61, 1 << 20, 30))
    assert len(summary(made, 60)[1]) == 1


def test_differing_rows_are_listed() -> None:
    row = {"text": "a", "region": "high", "reason": None, "prediction": 1, "abstained": False}
    row |= {"rescaled_similarity": 5.0, "probability": 0.9}
    other = row | {"region": "low", "abstained": True, "rescaled_similarity": 4.0}
    found = differences([row, row, row], [row, other, row | {"text": "b"}])
    assert (found["verdicts_that_differ"], found["answers_that_differ"]) == (1, 1)
    assert (found["of_the_same_answer"], found["differing"][0]["prompt"]) == (1, 1)
    assert found["differing"][0]["rescaled_similarity"] == [5.0, 4.0]
    assert found["differing"][0]["another_answer"] is False
