"""The soak's figures: a slope by hand, and every kind of trouble makes it fail."""

from __future__ import annotations

import pytest

from benchmarks.soak import Exchange, slope_per_hour, summary
from benchmarks.stability import differences


def test_slope() -> None:
    rising = [(float(t), 1000 + 2 * t, 5) for t in range(30)]
    assert slope_per_hour(rising) == pytest.approx(7200)  # 2 bytes a second
    # What is loaded in the first third is not a leak.
    assert slope_per_hour([(0.0, 0, 5), (1.0, 10**9, 5), *((2.0 + t, 10**9, 5) for t in range(20))]) == 0
    assert slope_per_hour([(0.0, 1, 5)]) == 0


def record() -> Exchange:
    made = Exchange(samples=[(float(t), 1 << 20, 10) for t in range(60)])
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


@pytest.mark.parametrize("trouble", ["failed", "accepted", "changed", "files"])
def test_something_wrong(trouble: str) -> None:
    made = record()
    if trouble == "failed":
        made.asked["stream", "500"] += 1
    elif trouble == "accepted":
        made.asked["wrong", "200"] += 1
    elif trouble == "changed":
        made.verdicts["p"] += [(at, "low", 1, "a") for at in (52.0, 54.0)]
    else:
        made.samples.append((61.0, 1 << 20, 30))
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
