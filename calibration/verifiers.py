"""Verifiers decide whether a response follows the instruction. This is the label y for everything later.

    exact              equal to the reference, outer white space aside
    normalised         equal after Unicode NFC, case folding and collapsing white space
    contains           the reference's words stand in the response, after `normalised`
    choice(A, B, ...)  of these options the response names one alone, and it is the reference; after `normalised`
    number(TOLERANCE)  its last number is the reference's: 0.01 apart at most, or 1% of the reference; default: equal
    regex              the reference, a Python regular expression, is found in the response (anchor it yourself)
    json               the response parses as the JSON value that the reference is
    json_schema(FILE)  it parses as JSON that the schema allows: that in the file, else the reference
    judge(FILE)        a language model says so (`calibration.judge`)
    person             somebody at the terminal says so (`calibration.person`)

Where several answers are right, the reference of `exact`, `normalised` and `contains` is a list of them.

A verifier can also be any Python function, as `module:function` or `file.py:function`, called as
`function(response, reference)`, and with `prompt` (text) and `record` (all columns) if it has parameters of these
names. It may be `async`. It returns True, False or "unknown". Both are searched for beside the data file, then in the
working directory; modules also among installed ones. It runs with the rights of the calibrating user: use data files
that you trust.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from math import isclose
from pathlib import Path
from typing import Any

from candor.calibration.errors import VerifierError
from candor.calibration.shapes import UNKNOWN
from candor.calibration.user_functions import load_function
from candor.model_store import strict_json
from candor.policy.conversation import shown

Verdict = bool | None
"""Whether a response follows its instruction; None: nobody can say."""


@dataclass(frozen=True)
class Question:
    """What a verifier is asked. messages: the conversation that was answered. row: the record's columns."""

    response: str
    reference: Any
    messages: Sequence[dict[str, str]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Verifier:
    """ask: a function, plain or async, that raises VerifierError where it cannot say anything.

    key: digest of what its verdicts depend on, where they are dear enough to be kept; None: they cost nothing.
    deferred: asked when all answers are there. costs: what was spent, in words. close: to be called after the last.
    """

    name: str
    ask: Callable[[Question], Any]
    key: str | None = None
    needs_reference: bool = True
    deferred: bool = False
    costs: Callable[[], str] | None = None
    close: Callable[[], Awaitable[None]] | None = None

    def __call__(self, response: str, reference: Any) -> Verdict:
        """Asks now, and waits for the verdict. Raises VerifierError."""
        verdict = self.ask(Question(response, reference))
        return _verdict(
            self.name, asyncio.run(self._awaited(verdict)) if inspect.isawaitable(verdict) else verdict
        )

    async def _awaited(self, verdict: Awaitable[Any]) -> Any:
        try:
            return await verdict
        finally:
            if self.close is not None:
                await self.close()

    async def label(self, question: Question) -> Verdict:
        """Asks without holding others up. Raises VerifierError."""
        if self.key is not None and not inspect.iscoroutinefunction(self.ask):
            verdict = await asyncio.get_running_loop().run_in_executor(_one_at_a_time(), self.ask, question)
        else:
            verdict = self.ask(question)
        if inspect.isawaitable(verdict):
            verdict = await verdict
        return _verdict(self.name, verdict)


@cache
def _one_at_a_time() -> ThreadPoolExecutor:
    """A user's function need not be safe in threads, and must not hold up the answers meanwhile."""
    return ThreadPoolExecutor(1, thread_name_prefix="verifier")


def _verdict(name: str, verdict: Any) -> Verdict:
    if type(verdict).__name__ in ("bool", "bool_"):  # numpy's, without importing it
        return bool(verdict)
    if isinstance(verdict, str) and verdict == UNKNOWN:
        return None
    raise VerifierError(f'verifier "{name}" returned {verdict!r}; it must return True, False or "{UNKNOWN}"')


def collapse(text: str) -> str:
    """Unicode NFC, runs of white space made one space, outer white space removed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalise(text: str) -> str:
    """`collapse`, and case folded."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _one_of(same: Callable[[str, str], bool], response: str, reference: str | Sequence[str]) -> bool:
    several = [reference] if isinstance(reference, str) else reference
    return any(same(response, one) for one in several)


def _exact(response: str, reference: str) -> bool:
    return response.strip() == reference.strip()


def _normalised(response: str, reference: str) -> bool:
    return normalise(response) == normalise(reference)


def _contains(response: str, reference: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(normalise(reference))}(?!\w)", normalise(response)) is not None


def _regex(response: str, reference: str) -> bool:
    return re.search(reference, response) is not None


def _choice(response: str, reference: Mapping[str, Any]) -> bool:
    """reference: {"answer", "options"}."""
    named = [one for one in reference["options"] if _names(response, one)]
    # "not good" names "good" too: of two options, the one within the other does not count.
    named = [one for one in named if not any(one != other and _contains(other, one) for other in named)]
    return [normalise(one) for one in named] == [normalise(reference["answer"])]


def _names(response: str, option: str) -> bool:
    """A single letter counts as it is written: "a" is a word."""
    if len(option) > 1:
        return _contains(response, option)
    return re.search(rf"(?<!\w){re.escape(option)}(?!\w)", response) is not None


_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
)
"""A sign belongs to a number unless something stands right before it: 10-5 ends with 5."""


def last_number(text: str) -> float | None:
    """The last number in a text, such as -1,234.5; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def _number(tolerance: str, response: str, reference: Any) -> bool:
    said, right = last_number(response), last_number(str(reference))
    if said is None or right is None:
        return False
    if tolerance.endswith("%"):
        return abs(said - right) <= abs(right) * float(tolerance[:-1]) / 100 * (1 + 1e-9)
    return isclose(said, right, rel_tol=1e-9, abs_tol=float(tolerance or 0) * (1 + 1e-9))


def _json_equal(response: str, reference: Any) -> bool:
    """False where the response is not JSON by `model_store.strict_json` (no NaN, no repeated key)."""
    try:
        value = strict_json.parse(response.encode())
    except ValueError:
        return False
    return _same_json(value, reference)


def _allowed_by_schema(response: str, schema: Any) -> bool:
    from jsonschema import validators

    try:
        value = strict_json.parse(response.encode())
    except ValueError:
        return False
    return bool(validators.validator_for(schema)(schema).is_valid(value))


_TEXTS = ("exact", "normalised", "contains")
_PLAIN: dict[str, Callable[[str, Any], bool]] = {
    "exact": partial(_one_of, _exact),
    "normalised": partial(_one_of, _normalised),
    "contains": partial(_one_of, _contains),
    "choice": _choice,
    "number": partial(_number, ""),
    "regex": _regex,
    "json": _json_equal,
    "json_schema": _allowed_by_schema,
}
BUILT_IN = (*_PLAIN, "judge", "person")
_WITH_ARGUMENT = re.compile(r"(choice|number|json_schema|judge)\((.*)\)", re.DOTALL)


def as_reference(verifier: str, reference: Any, options: Any = None, *, typed: bool = True) -> Any:
    """A reference as its verifier takes it. options: what may be chosen. typed: JSON; else its values are texts.

    Raises VerifierError.
    """
    kind, argument = _parts(verifier)
    if kind in (*_TEXTS, "choice") and isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if kind in ("json", "json_schema") and not typed and isinstance(reference, str):
        try:
            return strict_json.parse(reference.encode())
        except ValueError as error:
            raise VerifierError(f'"reference" is not JSON, as verifier "{kind}" expects: {error}') from error
    if kind == "choice" and not isinstance(reference, Mapping):
        of = [part.strip() for part in argument.split(",")] if argument else _options(options)
        return {"answer": reference, "options": of}
    return reference


def _options(options: Any) -> list[str]:
    """["a", "b"], {"text": [...], "label": [...]} as ARC has it, or "a|b"."""
    if isinstance(options, Mapping):
        options = options.get("label") or options.get("text")
    if isinstance(options, str):
        options = options.strip("[]").split("|")
    return [str(one).strip() for one in options or ()]


def reference_problem(verifier: str, reference: Any) -> str | None:
    """Why this reference cannot be used with this verifier; None if it can."""
    kind, argument = _parts(verifier)
    if kind in _TEXTS or kind == "regex":
        several = reference if isinstance(reference, list) and kind in _TEXTS else [reference]
        if not several or not all(isinstance(one, str) for one in several):
            return f'"reference" must be a string for verifier "{kind}", not {type(reference).__name__}'
    if kind == "regex":
        try:
            re.compile(reference)
        except (re.error, OverflowError, RecursionError) as error:
            return f'"reference" is not a regular expression: {error}'
    if kind == "choice":
        return _choice_problem(reference)
    if kind == "number" and (isinstance(reference, bool) or last_number(str(reference)) is None):
        return f'"reference" must be a number for verifier "number", not {json.dumps(reference, default=str)}'
    if kind == "json_schema" and not argument:
        return _schema_problem(reference)
    return None


def _choice_problem(reference: Any) -> str | None:
    answer, options = reference.get("answer"), reference.get("options")
    if not isinstance(options, list) or len(options) < 2:
        return (
            'verifier "choice" needs the options: --verifier "choice(A, B, C)", or a column "options" with a list; '
            f"got {json.dumps(options, default=str)}"
        )
    if not isinstance(answer, str) or normalise(answer) not in map(normalise, options):
        return f'"reference" must be one of {", ".join(options)}, not {json.dumps(answer, default=str)}'
    return None


def _schema_problem(schema: Any) -> str | None:
    from jsonschema import SchemaError, validators

    if not isinstance(schema, dict):
        return f'"reference" must be a JSON schema for verifier "json_schema", not {type(schema).__name__}'
    try:
        validators.validator_for(schema).check_schema(schema)
    except SchemaError as error:
        return f'"reference" is no JSON schema: {error.message}'
    return None


def _parts(name: str) -> tuple[str, str]:
    """("number", "0.01") of "number(0.01)"; ("exact", "") of "exact"."""
    found = _WITH_ARGUMENT.fullmatch(name)
    return (found[1], found[2].strip()) if found else (name, "")


def without_folders(name: str) -> str:
    """The verifier's name as reports show it, since folders would reveal the machine: "judge(judge.toml)"."""
    return re.sub(r"[^(]*/", "", name)


@cache
def load_verifier(name: str, beside: Path | None = None) -> Verifier:
    """Loads the verifier of that name or path. beside: folder of the data file that names it.

    Raises VerifierError.
    """
    folders = list(dict.fromkeys(str(f.resolve()) for f in (beside, Path.cwd()) if f is not None))
    kind, argument = _parts(name)
    if kind == "judge":
        from candor.calibration.judge import JudgeModel

        return JudgeModel.load(
            _found(argument, folders, 'verifier "judge": judge(FILE) names a TOML file')
        ).verifier()
    if kind == "person":
        return Verifier(name, lambda _: UNKNOWN, "person", needs_reference=False, deferred=True)
    if kind in _PLAIN:
        return _built_in(name, kind, argument, folders)
    if ":" not in name:
        raise VerifierError(
            f'unknown verifier "{name}": use one of {", ".join(BUILT_IN)}, or module:function, '
            "or file.py:function"
        )
    found = load_function(name, folders)
    asking = _asking(name, found.call, found.wanted)
    return Verifier(name, asking, f"{name} {found.digest}", needs_reference=False)


def _built_in(name: str, kind: str, argument: str, folders: Sequence[str]) -> Verifier:
    function = _PLAIN[kind]
    needs_reference = True
    if kind == "number":
        try:
            tolerance = float(argument.removesuffix("%") or 0)
        except ValueError:
            tolerance = -1
        if not 0 <= tolerance < float("inf"):
            raise VerifierError(f'verifier "{name}": the tolerance is a number such as 0.01, or 1%')
        function = partial(_number, argument)
    if kind == "json_schema" and argument:
        file = _found(argument, folders, 'verifier "json_schema"')
        try:
            schema = strict_json.parse(file.read_bytes())
        except ValueError as error:
            raise VerifierError(f"{file} is not JSON: {error}") from error
        if problem := _schema_problem(schema):
            raise VerifierError(f"{file}: {problem}")
        needs_reference = False
        return Verifier(name, lambda asked: _allowed_by_schema(asked.response, schema), None, needs_reference)
    return Verifier(name, lambda asked: function(asked.response, asked.reference), None, needs_reference)


def _found(file: str, folders: Sequence[str], what: str) -> Path:
    path = next((path for folder in folders if file and (path := Path(folder, file)).is_file()), None)
    if path is None:
        raise VerifierError(f"{what}; {file or 'none'} was not found in {' and '.join(folders)}")
    return path


def _asking(name: str, function: Callable[..., Any], wanted: frozenset[str]) -> Callable[[Question], Any]:
    def more(asked: Question) -> dict[str, Any]:
        every = {"prompt": shown(list(asked.messages)) if asked.messages else "", "record": dict(asked.row)}
        return {one: every[one] for one in wanted}

    def failed(error: Exception) -> VerifierError:
        return VerifierError(
            f'verifier "{name}" failed with {type(error).__name__}: {error}; '
            f'a verifier must return False for a wrong answer, or "{UNKNOWN}", not raise'
        )

    async def ask_async(asked: Question) -> Any:
        try:
            return await function(asked.response, asked.reference, **more(asked))
        except Exception as error:
            raise failed(error) from error

    def ask(asked: Question) -> Any:
        try:
            return function(asked.response, asked.reference, **more(asked))
        except Exception as error:
            raise failed(error) from error

    return ask_async if inspect.iscoroutinefunction(function) else ask


def _same_json(a: Any, b: Any) -> bool:
    # In Python True == 1; in JSON they differ, while 1 and 1.0 are one number.
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    return bool(a == b)
