"""Verifiers decide whether a response follows the instruction. This is the label y for everything later.

A verifier maps (response, reference) to y in {0, 1}. Four are built in, named in the data:

    exact        equal, outer white space aside
    normalised   equal after Unicode NFC, case folding and collapsing white space
    regex        the reference, a Python regular expression, is found in the response (anchor it yourself)
    json         the response parses as the JSON value that the reference is

A verifier can also be any Python function, as `module:function` or `file.py:function`, called as
`function(response, reference) -> bool`. Both are searched for beside the data file, then in the working directory;
modules also among installed ones. It runs with the rights of the calibrating user: use data files that you trust.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from os.path import realpath
from pathlib import Path
from types import ModuleType
from typing import Any

from candor.calibration.errors import VerifierError
from candor.model_store import strict_json

Verifier = Callable[[str, Any], bool]


def exact(response: str, reference: str) -> bool:
    return response.strip() == reference.strip()


def normalise(text: str) -> str:
    """Unicode NFC, case folded, runs of white space made one space, outer white space removed."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def normalised(response: str, reference: str) -> bool:
    return normalise(response) == normalise(reference)


def regex(response: str, reference: str) -> bool:
    return re.search(reference, response) is not None


def json_equal(response: str, reference: Any) -> bool:
    """False where the response is not JSON by `model_store.strict_json` (no NaN, no repeated key)."""
    try:
        value = strict_json.parse(response.encode())
    except ValueError:
        return False
    return _same_json(value, reference)


BUILT_IN: dict[str, Verifier] = {
    "exact": exact,
    "normalised": normalised,
    "regex": regex,
    "json": json_equal,
}


def reference_problem(verifier: str, reference: Any) -> str | None:
    """Why this reference cannot be used with this verifier; None if it can."""
    if verifier in ("exact", "normalised", "regex") and not isinstance(reference, str):
        return f'"reference" must be a string for verifier "{verifier}", not {type(reference).__name__}'
    if verifier == "regex":
        try:
            re.compile(reference)
        except (re.error, OverflowError, RecursionError) as error:
            return f'"reference" is not a regular expression: {error}'
    return None


@cache
def load_verifier(name: str, beside: Path | None = None) -> Verifier:
    """Loads the verifier of that name or path. beside: folder of the data file that names it.

    Raises VerifierError.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    source, colon, function_name = name.rpartition(":")
    if not colon:
        raise VerifierError(
            f'unknown verifier "{name}": use one of {", ".join(BUILT_IN)}, or module:function, '
            "or file.py:function"
        )
    folders = list(dict.fromkeys(str(f.resolve()) for f in (beside, Path.cwd()) if f is not None))
    with _first_on_path(folders):
        load = _load_file if source.endswith(".py") else _load_module
        module = load(source, folders)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise VerifierError(f'verifier "{name}": {source} has no function "{function_name}"')
    _require_two_arguments(name, function)

    def verify(response: str, reference: Any) -> bool:
        try:
            verdict = function(response, reference)
        except Exception as error:
            raise VerifierError(
                f'verifier "{name}" failed with {type(error).__name__}: {error}; '
                "a verifier must return False for a wrong answer, not raise"
            ) from error
        if not isinstance(verdict, bool):
            raise VerifierError(f'verifier "{name}" returned {verdict!r}; it must return True or False')
        return verdict

    return verify


@contextmanager
def _first_on_path(folders: Sequence[str]) -> Iterator[None]:
    """Puts the folders first on the path, so that a user's `app` or `engine` is found before others. Afterwards they
    are last: imports that a verifier makes when called still work, and no installed module is hidden from us."""
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
        sys.path += [folder for folder in folders if folder not in sys.path]


def _load_module(source: str, folders: Sequence[str]) -> ModuleType:
    _require_unhidden(source.partition(".")[0], folders)
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise VerifierError(
            f'verifier module "{source}" cannot be imported: {type(error).__name__}: {error}; looked in '
            f"{' and '.join(folders)} and among what is installed; name a file as path/to/file.py:function otherwise"
        ) from error


def _require_unhidden(name: str, folders: Sequence[str]) -> None:
    """Raises VerifierError where an already imported module of that name would be used instead of the one meant."""
    meant, loaded = PathFinder.find_spec(name, folders), sys.modules.get(name)
    if meant is None or meant.origin is None or loaded is None:
        return
    origin = str(loaded.__spec__ and loaded.__spec__.origin)
    if realpath(origin) != realpath(meant.origin):
        raise VerifierError(
            f'verifier module "{name}" is {meant.origin}, but {origin} is imported under that name: '
            "rename yours, or name a file as path/to/file.py:function"
        )


def _load_file(source: str, folders: Sequence[str]) -> ModuleType:
    path = next((path for folder in folders if (path := Path(folder, source)).is_file()), None)
    if path is None:
        raise VerifierError(f"verifier file {source} not found; looked in {' and '.join(folders)}")
    spec = importlib.util.spec_from_file_location(f"candor_verifier_{path.stem}", path)
    if spec is None or spec.loader is None:  # only for the type checker: a .py path always has both
        raise VerifierError(f"verifier file {path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise VerifierError(f"verifier file {path} failed: {type(error).__name__}: {error}") from error
    return module


def _require_two_arguments(name: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind("", "")
    except TypeError as error:
        raise VerifierError(f'verifier "{name}" must take (response, reference): {error}') from error
    except ValueError:  # some C functions have no signature; the call will show it
        return


def _same_json(a: Any, b: Any) -> bool:
    # In Python True == 1; in JSON they differ, while 1 and 1.0 are one number.
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    return bool(a == b)
