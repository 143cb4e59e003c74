"""A cache of finished answers, from which a killed run resumes.

An answer costs a generation; a label, a split and a layer cost little. So the response and its h are
committed as soon as the engine returns them, under a key that digests everything the answer depends on.
Labels that somebody was asked for (a judge, a function of the user's, a person) are kept beside them, under keys of
their own: a changed verifier needs no new generation, and no verdict is paid for twice. So are another model's
replies (`calibration.cascade`).

The file is one SQLite database in write-ahead mode. A process that dies by any signal leaves the answers
committed so far intact. Several runs may share a cache. Files from before prompts' states were kept get the column;
their answers remain, without those states.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from candor.calibration.errors import CacheError

FILE_NAME = "answers.sqlite"


@dataclass(frozen=True)
class CachedAnswer:
    """What the engine returned for one record. h: (D,) float32, in the representation's order. prompt: (P,) float32,
    states at the end of prefill; (0,) where they are not known."""

    response: str
    truncated: bool
    h: torch.Tensor
    prompt: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class KeptReply:
    """What another model said. text: None if it refused to answer. Tokens: by its own count, None if it gave none."""

    text: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def cache_key(**depends_on: Any) -> str:
    """SHA-256 of everything that an answer depends on, as JSON with sorted keys."""
    text = json.dumps(depends_on, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """A map from key to answer on disk; a context manager.

    The constructor and every method raise CacheError where the file is not such a cache, is locked or full.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the latest answers
            self._database.execute(
                "BEGIN IMMEDIATE"
            )  # of several runs that start together, one adds the column
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, response TEXT NOT NULL, truncated INTEGER NOT NULL, h BLOB NOT NULL, "
                "prompt BLOB NOT NULL DEFAULT x'')"
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS labels (key TEXT PRIMARY KEY, label INTEGER)"  # NULL: unknown
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies "
                "(key TEXT PRIMARY KEY, text TEXT, prompt_tokens INTEGER, completion_tokens INTEGER)"
            )
            columns = {row[1] for row in self._database.execute("PRAGMA table_info(answers)")}
            if "prompt" not in columns:
                self._database.execute("ALTER TABLE answers ADD COLUMN prompt BLOB NOT NULL DEFAULT x''")
            self._database.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            if hasattr(self, "_database"):
                self._database.close()
            raise self._failed(error) from error

    def get(self, key: str) -> CachedAnswer | None:
        try:
            row = self._database.execute(
                "SELECT response, truncated, h, prompt FROM answers WHERE key = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if row is None:
            return None
        response, truncated, *states = row
        # Copied: the bytes that SQLite hands out are read-only.
        h, prompt = (torch.from_numpy(np.frombuffer(state, "<f4").copy()) for state in states)
        return CachedAnswer(response, bool(truncated), h, prompt)

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Stores an answer; once this returns, the answer survives the death of this process."""
        h, prompt = (
            one.to(torch.float32).numpy().astype("<f4").tobytes() for one in (answer.h, answer.prompt)
        )
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO answers (key, response, truncated, h, prompt) VALUES (?, ?, ?, ?, ?)",
                (key, answer.response, answer.truncated, h, prompt),
            )
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def holds(self, key: str, *, prompt_states: bool) -> bool:
        """Whether an answer is kept. prompt_states: with its prompt's states."""
        try:
            return (
                self._database.execute(
                    "SELECT 1 FROM answers WHERE key = ? AND (length(prompt) OR NOT ?)", (key, prompt_states)
                ).fetchone()
                is not None
            )
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def get_label(self, key: str) -> tuple[bool | None] | None:
        """The verdict that is kept, None for unknown, in a tuple; None where none is kept."""
        try:
            row = self._database.execute("SELECT label FROM labels WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return None if row is None else (None if row[0] is None else bool(row[0]),)

    def put_label(self, key: str, verdict: bool | None) -> None:
        """Stores a verdict; once this returns, it survives the death of this process."""
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO labels VALUES (?, ?)",
                (key, None if verdict is None else int(verdict)),
            )
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def get_reply(self, key: str) -> KeptReply | None:
        try:
            row = self._database.execute(
                "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE key = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return None if row is None else KeptReply(*row)

    def put_reply(self, key: str, reply: KeptReply) -> None:
        """Stores another model's reply; once this returns, it survives the death of this process."""
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)",
                (key, reply.text, reply.prompt_tokens, reply.completion_tokens),
            )
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def __len__(self) -> int:
        count: int = self._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        return count

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, error: Exception) -> CacheError:
        return CacheError(
            f"the cache {self.path} cannot be used: {error}; free space or rights may help, "
            "or delete the file to start anew, or name another folder with --hidden-cache"
        )
