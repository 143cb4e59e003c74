"""Reads labelled data in Python, as the commands read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from candor.calibration.data import Record, load_records
from candor.calibration.shapes import Reading


def read_records(
    source: str | Path, *, columns: Mapping[str, str] | None = None, verifier: str | None = None
) -> list[Record]:
    """Reads the records of a file (JSON Lines, JSON, CSV, Parquet, exports), a data set's folder, or hf:NAME.

    columns: by field, the column it stands in, such as {"prompt": "question"}. verifier: of records that name none.
    Raises CalibrationError that lists what cannot be used; ValueError for a field that there is not.
    """
    return load_records(source, Reading(columns or {}, verifier))
