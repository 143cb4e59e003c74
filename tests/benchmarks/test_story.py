"""The story's traffic: prompts of the task that nothing was made from, each once, some of them in small letters."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from benchmarks.story import lowered, prompts
from demo import task

ROOT = Path(__file__).resolve().parents[2]


def test_the_gateway_writes_small_letters_and_leaves_the_instruction() -> None:
    content = task.prompt("The Children ran home before the", ["began.", "Storm"])
    one = {"messages": [{"role": "user", "content": content}], "reference": "right"}
    instruction = task.INSTRUCTION.split("\n")[0]
    assert lowered(one)["messages"][0]["content"] == (
        f"{instruction}\nSentence: the children ran home before the\nWords: began. storm"
    )
    assert lowered(one)["reference"] == "right"


def test_prompts_come_once_and_are_none_of_the_bundles(tmp_path: Path) -> None:
    task.main(ROOT / "demo/sentences.txt", tmp_path)
    usual = [one["messages"][0]["content"] for one in islice(prompts(0.0), 2000)]
    assert len(set(usual)) == 2000
    files = (tmp_path / f"{name}.jsonl" for name in ("calibration", "train"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    taught = {json.loads(line)["reference"] for line in lines}
    assert len(taught) > 3000
    assert not taught & {one["reference"] for one in islice(prompts(0.0), 2000)}
    some = [one["messages"][0]["content"].split("\n", 1)[1] for one in islice(prompts(0.25), 2000)]
    small = sum(one.partition(": ")[2].partition("\n")[0].islower() for one in some)
    assert 400 < small < 600
