"""Holds vLLM's h to transformers' for a tiny model of each family and writes the table of what was found.

    python -m benchmarks.zoo                          every family, one after the other, into docs/models.md
    python -m benchmarks.zoo --family "Gemma 2"       one or more of them, printed
    python -m benchmarks.zoo --at-once 8              eight beside each other, where there are cores for them

Each runs in a process of its own. float32, without compilation, every way of `contract.py`: vLLM's h is held to
transformers', and to what vLLM itself computes. Where vLLM computes in bfloat16 alone, h may be as far from
transformers' as that is from its own in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.zoo.contract import CHUNK, REPRESENTATION, Contract
from benchmarks.zoo.families import AS_VLLM, BFLOAT16, FAMILIES, build

EXACT = 1e-4
"""Largest relative error that counts as exact; exact results have about 1e-6."""
ROUNDED = 4.5e-2
"""The same for bfloat16 and what vLLM itself computes: a cosine of 0.999."""
LIMIT_S = 900
TABLE = "| family | architecture | vLLM's h |\n|---|---|---|\n"
MARKS = "<!-- zoo -->\n", "<!-- end of zoo -->"
"""The table in docs/models.md is between these marks."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], prog="python -m benchmarks.zoo"
    )
    parser.add_argument(
        "--family", action="append", choices=FAMILIES, metavar="FAMILY", help="one of them; again for another"
    )
    parser.add_argument("--kept", type=Path, help="file of results: those there are not run again")
    parser.add_argument("--print", action="store_true", help="leave docs/models.md as it is")
    parser.add_argument("--at-once", type=int, default=1, help="families that run beside each other")
    parser.add_argument("--here", choices=FAMILIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(hold(given.here)))
        return
    kept: dict[str, Any] = json.loads(given.kept.read_text()) if given.kept and given.kept.exists() else {}
    # Results from before h was held to vLLM itself are found anew.
    kept = {name: found for name, found in kept.items() if "errors" not in found or "own" in found}
    asked = given.family or list(FAMILIES)
    with ThreadPoolExecutor(given.at_once) as pool:
        results = pool.map(lambda family: kept.get(family) or _in_a_process_of_its_own(family), asked)
        for family, found in zip(asked, results, strict=True):
            kept[family] = found
            if given.kept:
                given.kept.write_text(json.dumps(kept, indent=1))
            print(_row(family, found), flush=True)
    if not given.family and not given.print:
        rows = (_row(family, kept[family]) + "\n" for family in FAMILIES if family in kept)
        _put(TABLE + "".join(rows), Path("docs/models.md"))


def hold(family: str) -> dict[str, Any]:
    """{"errors": {way: error}, "own": {way: error}}, {"refused": our sentence} or {"not run": vLLM's}.

    errors: to transformers' h. own: to what vLLM itself computes. unlike: of one answer, before transformers was
    changed to compute as vLLM does. noise: in bfloat16, of transformers' h to that in float32.
    """
    from candor.engine.base import EngineError
    from candor.engine.factory import start_engine
    from candor.engine.prompt import ChatFormat
    from candor.engine.settings import EngineSettings

    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        model = build(family, Path(folder) / "model")
        settings = EngineSettings(
            model,
            "transformers",
            REPRESENTATION,
            "bfloat16" if family.startswith(BFLOAT16) else "float32",
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=CHUNK,
            kv_cache_bytes=1 << 27,
            eager=True,
            vllm={"gpu_memory_utilization": 0.1},  # several share a GPU
        )
        chat = ChatFormat.from_directory(model)
        reference = runner.run(start_engine(settings, chat))
        try:
            engine = runner.run(start_engine(replace(settings, kind="vllm"), chat))
        except EngineError as error:
            return {"not run" if str(error).startswith("vLLM did not start") else "refused": str(error)}
        try:
            contract = Contract(engine, reference, chat, noisy=settings.dtype == "bfloat16")
            own = runner.run(contract.hold_to_itself())
            unlike, noise = {}, {}
            if settings.dtype == "bfloat16":
                exact = runner.run(start_engine(replace(settings, dtype="float32"), chat))
                noisy = runner.run(Contract(reference, exact, chat, noisy=True).hold())
                noise = {"noise": max(one.error for one in noisy)}
            if family in AS_VLLM:
                unlike = {"unlike": runner.run(contract.fresh()).error}
                AS_VLLM[family][0](vars(reference)["_model"])
            found = runner.run(contract.hold())
        except EngineError as error:
            return {"not run": str(error)}
        finally:
            runner.run(engine.close())
    errors, itself = ({one.where: one.error for one in some} for some in (found, own))
    return {"errors": errors, "own": itself, **unlike, **noise}


def _put(table: str, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    page.write_text(before + MARKS[0] + table + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def _in_a_process_of_its_own(family: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zoo", "--here", family]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"not run": f"no result within {LIMIT_S} s"}
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    result: dict[str, Any] = json.loads(last) if last.startswith("{") else {"not run": "no result"}
    if "not run" in result:
        result["why"] = _reasons(done.stderr.splitlines() + done.stdout.splitlines())
    return result


def _reasons(lines: Iterable[str]) -> list[str]:
    """The exceptions that ended vLLM's processes, the deepest first."""
    found = (re.search(r"\b(?:\w+(?:Error|Exception)): +(.+)", line) for line in lines)
    said = [match[1].strip() for match in found if match]
    return list(dict.fromkeys(said))[:6]


def _row(family: str, result: dict[str, Any]) -> str:
    architecture = FAMILIES[family][1]
    if "refused" in result:
        return f"| {family} | {architecture} | refused: {result['refused']} |"
    if "not run" in result:
        why = next((reason for reason in result.get("why", ()) if len(reason) > 20), result["not run"])
        return f"| {family} | {architecture} | not run: {why.replace('|', '/')} |"
    (where, error), (own_where, own) = (
        max(result[which].items(), key=lambda item: item[1]) for which in ("errors", "own")
    )
    noise = result.get("noise")
    if own > (EXACT if noise is None else ROUNDED):
        said = f"wrong: {own:.0e} from what vLLM computes ({own_where})"
    elif error > (EXACT if noise is None else noise):
        said = f"differs: {error:.0e} ({where}), but {own:.0e} from what vLLM computes"
    elif noise is not None:
        said = f"bfloat16 alone: {error:.0e}, where transformers' own noise is {noise:.0e}"
    else:
        said = f"exact, {max(error, own):.0e}"
        if "unlike" in result:
            said += f", {AS_VLLM[family][1]} ({result['unlike']:.0e})"
        if any("none found" in way for way in result["errors"]):
            said += ", but no tag of its own writing was seen"
    return f"| {family} | {architecture} | {said} |"


if __name__ == "__main__":
    main()
