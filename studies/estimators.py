"""Is there a sturdier estimator than SDM_HR? Variants on the same trained layers, several data sets and seeds.

    python -m studies.estimators [--seeds 5] [--real-seeds 3]

One invalid neighbour ends q, so a handful of bad support rows can shrink a region. Compared with SDM_HR and its lower
band, each with everything else (layer, distances, Algorithm 1, alpha) as it is:

    q up to t invalid       valid rows nearer than the (t + 1)-th invalid one, less t
    distance-weighted q     sum of w over valid rows less that over invalid ones; w = exp(1 - D / d_nearest)
    k times the minimum     Algorithm 1 asks for k ceil(1 / (1 - alpha)) points of every class
    separate halves         thresholds from calibration rows that did not choose the epoch
    ensemble of 3           unanimous, other halves and weights each (`sdm.ensemble`)

Reported are held-out shares: admitted; right among the admitted; and both once two in a hundred support rows
have been added beside existing ones with another label, as bad feedback would.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor

from candor.calibration.fit import standardisation_blocks
from candor.calibration.generate import scorable
from candor.calibration.layer import LayerSettings, split_halves, train_layer
from candor.model_store.bundle import load_bundle
from candor.sdm.activation import sdm as activation
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.ensemble import combine
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Measurement
from candor.sdm.region import find_region, minimum_points, q_prime
from candor.sdm.support import Support
from studies.two_tasks.tasks import ARITHMETIC, DEMO, Task, answers

ALPHA = 0.9
GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"


@dataclass(frozen=True, eq=False)
class Data:
    """A pool h (n, D), y (n,) to make halves of, and held-out rows."""

    h: Tensor
    y: Tensor
    h_test: Tensor
    y_test: Tensor
    settings: LayerSettings

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


def drawn(seed: int, gap: float, rare: float = 0.5, noise: float = 0.0) -> Data:
    """Two overlapping classes in 32 dimensions; the second with share `rare`, labels turned with share `noise`."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(3000, generator=generator) < rare).long()
    h = torch.randn(3000, 32, generator=generator)
    h[:, :4] += gap * (2 * y - 1).unsqueeze(1)
    y = torch.where(torch.rand(3000, generator=generator) < noise, 1 - y, y)
    return Data(h[:1000], y[:1000], h[1000:], y[1000:], LayerSettings(64, 40, learning_rate=1e-3))


def golden(name: str, seed: int) -> Data:
    """The in-distribution rows of a recorded fixture, pooled and dealt anew."""
    with np.load(GOLDEN / f"{name}.npz") as f:
        known = f["test_kind"] == 0
        h = torch.from_numpy(np.concatenate([f["x_train"], f["x_cal"], f["x_test"][known]]))
        y = torch.from_numpy(np.concatenate([f["y_train"], f["y_cal"], f["y_test"][known]])).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    fitting, held_out = order[: len(y) // 2], order[len(y) // 2 :]
    settings = LayerSettings(64, 40, learning_rate=1e-3)
    return Data(h[fitting], y[fitting], h[held_out], y[held_out], settings)


def real(task: Task) -> Data:
    """A task's answers as its bundle judges them."""
    manifest = load_bundle(task.bundle).manifest

    def tensors(name: str) -> tuple[Tensor, Tensor]:
        kept = scorable(answers(task, name))
        return torch.stack([one.h for one in kept]), torch.tensor([one.label for one in kept])

    blocks = standardisation_blocks(manifest.representation, manifest.model.hidden_size)
    settings = LayerSettings(256, 100, learning_rate=1e-4, blocks=blocks)
    return Data(*tensors("calibration"), *tensors("test"), settings)


def bad_rows(support: Support, seed: int) -> Support:
    """Two in a hundred rows doubled, the double with another label."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(support), generator=generator)[: max(1, len(support) // 50)]
    labels = (support.labels[chosen] + 1) % (int(support.labels.max()) + 1)
    return support.updated(support.h_prime[chosen], labels, support.predictions[chosen])


def weighted(seen: Measurement, support: Support) -> Measurement:
    """With q weighted by distance."""
    distances = torch.cdist(seen.h_prime.double(), support.h_prime.double()).square()
    weights = torch.exp(1 - distances / distances.amin(dim=1, keepdim=True).clamp(min=1e-12))
    right = torch.where(support.labels == support.predictions, support.labels, -1)
    valid = right == seen.y_hat.unsqueeze(1)
    return replace(seen, q=torch.where(valid, weights, -weights).sum(dim=1).clamp(min=0))


@dataclass(frozen=True, eq=False)
class Judge:
    """Region and distances of one variant, from calibration rows; scores any rows."""

    calibration: Measurement
    labels: Tensor
    classes: int
    minimum: float = 1.0

    def admitted(self, seen: Measurement) -> Tensor:
        known = self.calibration
        ecdf = ClasswiseECDF.fit(known.d_nearest, known.q, self.labels, self.classes)

        def scores(one: Measurement) -> tuple[Tensor, Tensor, Tensor]:
            d = ecdf.quantile(one.d_nearest)
            sdm_ = activation(one.z_prime, one.q, d)
            return sdm_, q_prime(one.q, sdm_.gather(1, one.y_hat.unsqueeze(1)).squeeze(1)), d

        calibrated, rescaled, _ = scores(known)
        with mock.patch(
            "candor.sdm.region.minimum_points", lambda *args: self.minimum * minimum_points(*args)
        ):
            region = find_region(calibrated, rescaled, self.labels, ALPHA)
        found, rescaled, d = scores(seen)
        return region.admit(found, seen.y_hat, rescaled, (rescaled <= 0) | (d <= 0))


def layer(data: Data, seed: int) -> tuple[SDMEstimator, Tensor]:
    """A trained layer and the rows of its calibration half."""
    generator = torch.Generator().manual_seed(seed)
    train, cal = split_halves(data.y, generator)
    trained = train_layer(
        data.h[train],
        data.y[train],
        data.h[cal],
        data.y[cal],
        num_classes=data.classes,
        generator=generator,
        alphas=(ALPHA,),
        settings=data.settings,
    )
    return trained.estimator, cal


def variants(data: Data, seed: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, y_hat (n,), admitted (n,), admitted with bad support rows (n,)) on the held-out rows."""
    layers = [layer(data, 1000 * seed + j) for j in range(3)]
    estimator, cal = layers[0]
    spoilt = replace(estimator, support=bad_rows(estimator.support, seed))
    seen, seen_spoilt = estimator.measure(data.h_test), spoilt.measure(data.h_test)
    clear, spoilt_estimate = estimator.judge(seen, ALPHA), spoilt.judge(seen_spoilt, ALPHA)
    yield "SDM_HR", seen.y_hat, clear.admitted, spoilt_estimate.admitted
    yield "SDM_HR, lower", seen.y_hat, clear.admitted_lower, spoilt_estimate.admitted_lower
    known, labels = estimator.measure(data.h[cal]), data.y[cal]
    measured = (estimator, data.h[cal]), (estimator, data.h_test), (spoilt, data.h_test)
    for t in (1, 3):
        sturdy = replace(estimator.conventions, passed_over=t)
        fitted, found, bad = (replace(one, conventions=sturdy).measure(h) for one, h in measured)
        judge = Judge(fitted, labels, data.classes)
        yield f"q up to {t} invalid", seen.y_hat, judge.admitted(found), judge.admitted(bad)
    judge = Judge(weighted(known, estimator.support), labels, data.classes)
    yield (
        "distance-weighted q",
        seen.y_hat,
        judge.admitted(weighted(seen, estimator.support)),
        judge.admitted(weighted(seen_spoilt, spoilt.support)),
    )
    for factor in (0.01, 3):
        judge = Judge(known, labels, data.classes, factor)
        name = f"{factor} times the minimum" if factor > 1 else "no minimum"
        yield name, seen.y_hat, judge.admitted(seen), judge.admitted(seen_spoilt)
    # Half of the pool's calibration rows choose the epoch, the others give distances and thresholds.
    first, second = split_halves(labels, torch.Generator().manual_seed(seed))
    train = torch.ones(len(data.y), dtype=torch.bool).index_fill(0, cal, False).nonzero().flatten()
    apart = train_layer(
        data.h[train],
        data.y[train],
        data.h[cal[first]],
        data.y[cal[first]],
        num_classes=data.classes,
        generator=torch.Generator().manual_seed(seed),
        settings=data.settings,
    ).estimator
    rows = cal[second]
    judge = Judge(apart.measure(data.h[rows]), data.y[rows], data.classes)
    plain = apart.measure(data.h_test)
    again = replace(apart, support=bad_rows(apart.support, seed)).measure(data.h_test)
    yield "separate halves", plain.y_hat, judge.admitted(plain), judge.admitted(again)
    together = combine([one.estimate(data.h_test, ALPHA) for one, _ in layers])
    spoilt_together = combine(
        [replace(one, support=bad_rows(one.support, seed)).estimate(data.h_test, ALPHA) for one, _ in layers]
    )
    yield "ensemble of 3", together.y_hat, together.admitted, spoilt_together.admitted


def main(
    seeds: Annotated[int, typer.Option(help="Draws of every synthetic set and deals of every fixture.")] = 5,
    real_seeds: Annotated[int, typer.Option(help="Deals of both tasks' answers; 0 leaves them out.")] = 3,
) -> None:
    torch.set_num_threads(1)
    sets: dict[str, list[Data]] = {
        "overlap": [drawn(seed, 0.6) for seed in range(seeds)],
        "3 % of labels turned": [drawn(seed, 0.8, noise=0.03) for seed in range(seeds)],
        "one in ten of the second class": [drawn(seed, 0.8, rare=0.1) for seed in range(seeds)],
        "fixture of 2 classes": [golden("s01_c2_overlap", seed) for seed in range(seeds)],
        "fixture of 4 classes": [golden("s02_c4", seed) for seed in range(seeds)],
    }
    if real_seeds:
        sets |= {f"answers: {task.name}": [real(task)] * real_seeds for task in (DEMO, ARITHMETIC)}
    print(f"alpha {ALPHA}; means over {seeds} seeds (answers: {real_seeds}) of held-out shares in per cent")
    for title, draws in sets.items():
        if not draws:
            continue
        print(f"\n**{title}**\n\n| | admitted | right | admitted, bad rows | right, bad rows |")
        print("|---|---|---|---|---|", flush=True)
        figures: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
        for seed, data in enumerate(draws):
            for name, y_hat, admitted, spoilt in variants(data, seed):
                right = y_hat == data.y_test
                figures[name].append(
                    tuple(
                        float(value.float().mean())
                        for value in (admitted, admitted & right, spoilt, spoilt & right)
                    )  # type: ignore[arg-type]
                )
        for name, values in figures.items():
            share, hits, bad, bad_hits = (statistics.mean(column) for column in zip(*values, strict=True))
            cells = (share, hits / share if share else None, bad, bad_hits / bad if bad else None)
            print(
                f"| {name} | " + " | ".join("none" if c is None else f"{100 * c:.1f}" for c in cells) + " |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
