"""What can fail fails before a model starts; and what the first answers tell of all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.calibration.cache import CachedAnswer
from candor.calibration.data import Record, load_records
from candor.calibration.early import (
    Watch,
    certificate_hope,
    certificate_needs,
    records_needed,
    require_disk,
    require_enough,
    require_writable,
    try_verifiers,
)
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.fit import _require_enough
from candor.calibration.generate import Labelled
from candor.calibration.intervals import binomial_tails
from candor.calibration.run import HELD_OUT_SHARE, calibrate_answers
from candor.policy.policy import Policy

Task = Callable[[Path, Sequence[int]], Path]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    require_writable(tmp_path / "new/deep", "the cache")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"the cache .*file/deep cannot be written: Not a directory"):
        require_writable(tmp_path / "file/deep", "the cache")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(CalibrationError, match="Permission denied"):
            require_writable(tmp_path, "the cache")


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    require_disk(tmp_path, 1000, 1158, Policy())
    with pytest.raises(CalibrationError, match=r"records need about [\d,]+ MB in .*, and [\d,]+ MB are free"):
        require_disk(tmp_path, 10**12, 1158, Policy())


def labelled(ones: int, zeros: int) -> list[Labelled]:
    return [Labelled(str(i), str(i), (), "", int(i < ones), torch.zeros(1)) for i in range(ones + zeros)]  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.8, 0.9, 0.95])
def test_fewer_than_needed_never_suffice_and_as_many_do(alpha: float) -> None:
    """Held to the check that is made with the answers, with as many right ones as is best."""
    needed = records_needed(alpha, 0, 0)
    both = 4 / (1 - alpha) + 1e-9
    assert needed <= both
    _require_enough(some := labelled(round(both / 2), round(both / 2)), some, alpha)
    with pytest.raises(DataError):
        _require_enough(few := labelled((needed - 1) // 2, needed - 1 - (needed - 1) // 2), few, alpha)


def test_too_few_and_one_class(task: Task, tmp_path: Path) -> None:
    records = load_records(task(tmp_path / "d.jsonl", range(40)))
    with pytest.raises(
        DataError, match=r"d.jsonl has 40 prompts, and a region at alpha = 0.9 takes at least 48: 10 right"
    ):
        require_enough(records, 0.9, 0, HELD_OUT_SHARE, "d.jsonl")
    require_enough(records, 0.9, 0, 0, "d.jsonl")
    given = [
        Record(str(i), ({"role": "user", "content": str(i)},), i, response="a", label=1) for i in range(90)
    ]
    with pytest.raises(DataError, match=r"all 90 answers in d.jsonl are labelled right"):
        require_enough(given, 0.9, 0, 0, "d.jsonl")


@pytest.mark.parametrize(("accuracy", "delta"), [(0.9, 0.05), (0.95, 0.05), (0.99, 0.01)])
def test_the_least_that_a_certificate_takes(accuracy: float, delta: float) -> None:
    n = certificate_needs(accuracy, delta)
    assert float(binomial_tails(n, accuracy)[n]) <= delta < float(binomial_tails(n - 1, accuracy)[n - 1])


def test_no_hope_of_a_certificate_is_said() -> None:
    assert certificate_hope(1500, 0.2, 0.95, 0.05) is None
    said = certificate_hope(200, 0.2, 0.95, 0.05)
    assert said is not None
    assert said.startswith("40 prompts are set aside to certify on, and 0.95 at delta 0.05 takes at least 59")
    assert "295 records in all are the least" in said


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError(response)", "failed with KeyError"),
        ("return None", "returned None; it must return True, False or"),
        ("return 1.0", "returned 1.0"),
    ],
)
def test_a_verifier_is_tried_before_any_answer(body: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def f(response, reference):\n    {body}\n")
    row = {"prompt": "q", "reference": "a", "verifier": f"{tmp_path}/mine.py:f"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        try_verifiers(load_records(tmp_path / "d.jsonl"))
    assert 'line 1 (id "1"), tried before any answer: verifier' in str(caught.value)
    assert says in str(caught.value)


def watched(answers: Sequence[tuple[bool, bool | None]], records: int = 1000) -> list[str]:
    said: list[str] = []
    watch = Watch(records, 8, said.append)
    for i, (cut, verdict) in enumerate(answers):
        record = Record(f"r{i}", ({"role": "user", "content": "q"},), i, reference="4", verifier="exact")
        watch(record, CachedAnswer(f"answer {i}", cut, torch.zeros(1)), verdict)
    return said


def test_the_first_fifty_answers_tell_of_all() -> None:
    half = [(False, i % 2 == 0) for i in range(50)]
    assert watched(half * 3) == []
    assert watched([(i < 13, i % 2 == 0) for i in range(49)]) == []
    (said,) = watched([(i < 13, i % 2 == 0) for i in range(50)] + half)
    assert said.startswith("13 of the first 50 answers are cut off at 8 tokens")
    (said,) = watched([(False, False)] * 50)
    assert said == (
        "the first 50 answers are all wrong by verifier exact; for example r49: answer 'answer 49', reference '4'"
    )
    assert len(watched([(True, False)] * 60)) == 2
    assert watched([(True, True)] * 3, records=3)[0].startswith("3 of the first 3 answers are cut off")


def test_given_answers_are_not_watched() -> None:
    said: list[str] = []
    watch = Watch(1000, 8, said.append)
    record = Record("r", ({"role": "user", "content": "q"},), 1, response="a", label=1)
    for _ in range(60):
        watch(record, CachedAnswer("a", True, torch.zeros(1)), True)
    assert said == []


def test_unknown_labels_are_not_learnt_from_and_count_as_wrong() -> None:
    from candor.calibration.fit import FitSettings

    generator = torch.Generator().manual_seed(0)
    answers = []
    for i in range(400):
        right = i % 2
        h = torch.randn(4, generator=generator) + 4 * right
        unknown = i % 10 == 1
        label: Any = 0 if unknown else right
        answers.append(Labelled(str(i), str(i), (), "", label, h, unknown=unknown))
    settings = FitSettings((0.8,), rounds=1, epochs=5, exemplar_dim=8, learning_rate=0.05)
    outcome = calibrate_answers(answers, ((4, "scalar"),), settings, progress=lambda _: None)
    counts = outcome.report["counts"]
    assert counts["unknown_labels"] == 40
    fitted = counts["training_half"]["records"] + counts["calibration_half"]["records"]
    assert not any(one.unknown for one in outcome.fitted.answers)
    assert fitted + counts["held_out"]["records"] == 400 - (40 - round(40 * HELD_OUT_SHARE))
    assert outcome.evaluation.records == counts["held_out"]["records"] == 80
    assert outcome.evaluation.correct.hits == counts["held_out"]["correct"] < 40
