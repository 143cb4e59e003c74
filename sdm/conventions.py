"""The choices on which the papers, the public code and this project differ, in one object.

`DEFAULT` is what this project holds to be right. `RECORDED` reproduces the public implementation,
including its faults, so that its recorded vectors can be compared (benchmarks/conformance).
Every function that depends on such a choice takes the object; there are no other switches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conventions:
    """One field a choice; docs/notation.md gives the reason for each.

    max_q: cap on q, or None for the exact count. A self-excluded row's cap is one lower.
    passed_over: number of invalid neighbours that do not end q (the papers: 0); see `sdm.similarity`. In training, q
        always ends at the first.
    self_exclusion: the row that a support row leaves out when scored against its own support: itself
        ("index"), or the nearest row ("first match", which can be a duplicate of it).
    empty_class: d of a class without distances: left out of the minimum ("skip"), or 0, which makes
        d = 0 for every point and freezes training ("zero").
    quantile_index: floor((1 - alpha) n) over the decimal that alpha was written as ("exact"), or in
        double precision, which is one lower for alpha = 0.9 and n = 10 ("double").
    minimum_per_class: whether a region needs ceil(1 / (1 - alpha)) points of every class, so that no
        threshold rests on the class's single lowest point.
    zero_d_is_ood: whether d = 0 is out of distribution, as q = 0 is.
    missing_psi: psi where no region is found (the papers: inf; the public code: 0).
    stratified: whether training halves keep the classes' shares.
    """

    max_q: int | None = None
    passed_over: int = 0
    self_exclusion: Literal["index", "first match"] = "index"
    empty_class: Literal["skip", "zero"] = "skip"
    quantile_index: Literal["exact", "double"] = "exact"
    minimum_per_class: bool = True
    zero_d_is_ood: bool = True
    missing_psi: float = float("inf")
    stratified: bool = True


DEFAULT = Conventions()

RECORDED = Conventions(
    max_q=2048,
    self_exclusion="first match",
    empty_class="zero",
    quantile_index="double",
    minimum_per_class=False,
    zero_d_is_ood=False,
    missing_psi=0.0,
    stratified=False,
)
