"""Times the comparison of one answer, or of 64, with the support, against the public way and against the limit.

    python -m benchmarks.scoring [--rows 20000] [--rounds 7]

Three ways run in turn on the same support: ours (`sdm.similarity.neighbourhood`: q, d_nearest, nearest
row), the public implementation's (`benchmarks.public_way`: flat index, top 2,048, then q), and the limit,
which reads every number of the support once in order (by summing it). Seconds are CPU time of the process on
one thread, so that other load matters little. q must agree on every row (the public way's is capped),
d_nearest up to rounding.

Exemplars are drawn as an adaptor makes them: 256 directions of falling variance with classes slightly apart, mixed by
a random map into M = 1000.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import faiss
import torch
import typer
from torch import Tensor

from benchmarks.public_way import CAP, FlatSupport
from candor.sdm.similarity import neighbourhood
from candor.sdm.support import Support

WIDTH = 1000
LATENT = 256
SIZES = (2_500, 20_000, 120_000, 1_000_000)


@dataclass(frozen=True)
class Row:
    """One line of the table. Ratios are (median, lowest, highest) over the rounds; seconds are medians."""

    support: int
    queries: int
    ours_s: float
    of_limit: tuple[float, float, float]
    of_public: tuple[float, float, float]
    mean_q: float
    bytes_a_row: float

    def markdown(self) -> str:
        limit, public = (f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in (self.of_limit, self.of_public))
        return (
            f"| {self.support:,} | {self.queries} | {limit} | {public} | {1e3 * self.ours_s:.1f} | {self.mean_q:.0f} "
            f"| {self.bytes_a_row:,.0f} |"
        )


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws h' (n, 1000), labels (n,), predictions (n,); the same generator state gives the same map."""
    mixing = torch.randn(LATENT, WIDTH, generator=generator) / WIDTH**0.5
    spread = torch.arange(1, LATENT + 1) ** -0.4
    h_prime = torch.empty(n, WIDTH)
    labels = torch.randint(0, 2, (n,), generator=generator)
    predictions = torch.empty(n, dtype=torch.int64)
    for part in torch.split(torch.arange(n), 20_000):
        latent = torch.randn(len(part), LATENT, generator=generator) * spread
        latent[:, 3:13] += 0.3 * (2 * labels[part] - 1).unsqueeze(1)
        predictions[part] = (latent[:, 3:13].sum(dim=1) > 0).long()
        h_prime[part] = latent @ mixing
    return h_prime, labels, predictions


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(size: int, rounds: int, seed: int) -> list[Row]:
    h_prime, labels, predictions = draw(size + 64, torch.Generator().manual_seed(seed))
    support = Support(h_prime[:size], labels[:size], predictions[:size])
    public = FlatSupport.build(support.h_prime, support.labels, support.predictions)
    held = support.h_prime.nbytes + (support.sketch.nbytes if support.sketch else 0)
    found = []
    for count in (1, 64):
        queries, y_hat = h_prime[size : size + count], predictions[size : size + count]
        ours = neighbourhood(queries, y_hat, support)
        q, nearest = public.compare(queries, y_hat)
        if not torch.equal(ours.q.clamp(max=CAP), q):
            raise RuntimeError(f"q differs at N = {size}: {ours.q.tolist()} and {q.tolist()}")
        torch.testing.assert_close(ours.d_nearest, nearest, rtol=1e-3, atol=1e-4)
        times = [
            (
                seconds(lambda: neighbourhood(queries, y_hat, support)),  # noqa: B023
                seconds(lambda: public.compare(queries, y_hat)),  # noqa: B023
                seconds(support.h_prime.sum),
            )
            for _ in range(rounds)
        ]
        of_limit = [own / limit for own, _, limit in times]
        of_public = [theirs / own for own, theirs, _ in times]
        found.append(
            Row(
                size,
                count,
                statistics.median(own for own, _, _ in times),
                (statistics.median(of_limit), min(of_limit), max(of_limit)),
                (statistics.median(of_public), min(of_public), max(of_public)),
                float(ours.q.float().mean()),
                held / size,
            )
        )
    return found


def main(
    rows: Annotated[
        list[int] | None, typer.Option(help="Support rows; repeat for several. Default: all four.")
    ] = None,
    rounds: int = 7,
    seed: int = 0,
) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread used; torch {torch.__version__}; ", end=""
    )
    print(f"faiss {faiss.__version__}; median [lowest, highest] of {rounds} rounds\n")
    print(
        "| support rows | queries | times the limit | times as fast as the public way | ms | mean q | bytes a row |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in rows or SIZES:
        needed = 3 * size * WIDTH * 4  # exemplars, the index's copy, sketch and working room
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > free + _cached():
            print(
                f"| {size:,} | | skipped: needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free | | | | |"
            )
            continue
        for row in measure(size, rounds, seed):
            print(row.markdown(), flush=True)


def _cached() -> int:
    """Bytes of cache that Linux would free on demand."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    typer.run(main)
