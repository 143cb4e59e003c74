"""One recorded fixture, and the tally of what was compared with it.

Both guard against checks that pass without comparing anything: a fixture records which of its arrays were
read, so that unread ones are reported, and a tally counts the rows of every comparison.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 2e-5
"""Tolerance of floats, relative to max(1, |recorded|)."""


@dataclass
class Fixture:
    """Arrays of NAME.npz, settings of NAME.json; or the settings alone, a list of text cases."""

    name: str
    arrays: dict[str, Tensor]
    settings: Any
    read: set[str] = field(default_factory=set)

    def __contains__(self, array: str) -> bool:
        return array in self.arrays

    def __getitem__(self, array: str) -> Tensor:
        self.read.add(array)
        return self.arrays[array]

    def unread(self) -> list[str]:
        return sorted(set(self.arrays) - self.read)

    def number(self, array: str) -> float:
        return float(self[array])

    def flags(self, array: str) -> Tensor:
        return self[array].bool()

    def ragged(self, stem: str) -> list[Tensor]:
        """Pieces of `stem`_values between consecutive `stem`_offsets."""
        values, bounds = self[f"{stem}_values"], self[f"{stem}_offsets"].tolist()
        if bounds[0] != 0 or bounds[-1] != len(values) or bounds != sorted(bounds):
            raise ValueError(f"{stem}_offsets {bounds} don't divide {len(values)} values")
        return [values[a:b] for a, b in pairwise(bounds)]


def load(path: Path) -> Fixture:
    """Loads a fixture from its .npz, or from a .json without an .npz."""
    beside = path.with_suffix(".json")
    settings = json.loads(beside.read_text()) if beside.exists() else {}
    arrays = {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            for name, array in file.items():
                tensor = torch.from_numpy(array)
                arrays[name] = tensor if tensor.is_floating_point() else tensor.long()
    return Fixture(path.stem, arrays, settings)


def find(folder: Path) -> list[Path]:
    """Every fixture in a folder: .npz files, and .json files without an .npz, except README.json."""
    alone = [
        p for p in folder.glob("*.json") if not p.with_suffix(".npz").exists() and p.name != "README.json"
    ]
    return sorted([*folder.glob("*.npz"), *alone])


@dataclass
class Tally:
    """Rows compared and rows that differ, in all and by comparison."""

    rows: int = 0
    mismatches: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)

    def close(
        self,
        what: str,
        got: Tensor,
        recorded: Tensor,
        tolerance: float | Tensor = TOLERANCE,
        where: Tensor | None = None,
    ) -> None:
        """|got - recorded| <= tolerance * max(1, |recorded|) in every entry of a row; false for NaN."""
        got, recorded = torch.as_tensor(got).double(), recorded.double()
        if self._same_shape(what, got, recorded):
            near = (got - recorded).abs() <= tolerance * recorded.abs().clamp(min=1)
            self.true(what, (got == recorded) | near, where)

    def equal(self, what: str, got: Tensor, recorded: Tensor, where: Tensor | None = None) -> None:
        """Every entry of a row is equal."""
        got = torch.as_tensor(got)
        if self._same_shape(what, got, recorded):
            self.true(what, got == recorded, where)

    def true(self, what: str, holds: Tensor, where: Tensor | None = None) -> None:
        """A condition (n, ...) that must hold everywhere in a row."""
        rows = holds.flatten(1).all(dim=1) if holds.dim() > 1 else holds.reshape(-1)
        rows = rows if where is None else rows[where]
        self.rows += len(rows)
        self.compared[what] += len(rows)
        if wrong := int((~rows).sum()):
            self.mismatches[what] += wrong

    def _same_shape(self, what: str, got: Tensor, recorded: Tensor) -> bool:
        same = got.shape == recorded.shape
        if not same:
            self.rows += len(recorded)
            self.mismatches[f"{what}: shape {tuple(got.shape)}, recorded {tuple(recorded.shape)}"] += len(
                recorded
            )
        return same
