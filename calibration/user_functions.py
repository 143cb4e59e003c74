"""Finds a user's verifier function, `package.module:function` or `file.py:function`.

It is sought beside the data file, then in the working directory, then, for modules, among what is installed. A user's
own `app` or `engine` is found before others of that name, and hides nothing of ours once it is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import PathFinder
from os.path import realpath
from pathlib import Path
from types import ModuleType
from typing import Any

from candor.calibration.errors import VerifierError


@dataclass(frozen=True)
class UserFunction:
    """call: the function. wanted: which of `prompt` and `record` it takes. digest: of its file, or empty."""

    call: Callable[..., Any]
    wanted: frozenset[str]
    digest: str


def load_function(name: str, folders: Sequence[str]) -> UserFunction:
    """Imports "source:function". folders: where it may be. Raises VerifierError."""
    source, _, function_name = name.rpartition(":")
    with _first_on_path(folders):
        load = _load_file if source.endswith(".py") else _load_module
        module = load(source, folders)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise VerifierError(f'verifier "{name}": {source} has no function "{function_name}"')
    file = getattr(module, "__file__", None)
    digest = sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return UserFunction(function, _more_arguments(name, function), digest)


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


def _more_arguments(name: str, function: Callable[..., Any]) -> frozenset[str]:
    """Which of `prompt` and `record` a function takes, beyond response and reference."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some C functions have no signature; the call will show it
        return frozenset()
    more = frozenset({"prompt", "record"} & set(list(signature.parameters)[2:]))
    try:
        signature.bind("", "", **dict.fromkeys(more))
    except TypeError as error:
        raise VerifierError(
            f'verifier "{name}" must take (response, reference), and may take prompt and record: {error}'
        ) from error
    return more
