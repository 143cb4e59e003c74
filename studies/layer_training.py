"""What an epoch of layer training costs, beside the public implementation's way, in one run.

    python -m studies.layer_training [--rows 2500] [--rounds 50]

Both train the same layer on the same halves with the same shuffles, epoch by epoch in alternation, and
seconds are the process's own, so that what else the machine does counts little. The public way is written
afresh after its recorded behaviour: a convolution as wide as h, autograd through h', Adam, and after every
epoch a flat index over the training half asked for the top 2,048 of every row (`benchmarks.public_way`).
`ratio` is that of the sums over all epochs, of which one in 50 computes all distances anew.
Both arrive at the same balanced calibration losses: their largest difference is printed.

The data are drawn: h = class mean + Gaussian states whose variance falls off by direction, D wide.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks.public_way import FlatSupport
from candor.calibration.distances import RENEWED
from candor.calibration.epochs import Half, LayerSettings, run_epochs
from candor.sdm.activation import SOFTMAX_Q, balanced_loss, sdm_loss
from candor.sdm.adaptor import ExemplarAdaptor, fit_standardisation
from candor.sdm.distance import ClasswiseECDF


class PublicLayer(nn.Module):
    """h' by a one-dimensional convolution over all of h, z' by a linear map of it."""

    def __init__(self, adaptor: ExemplarAdaptor) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, adaptor.exemplar_dim, adaptor.input_dim)
        self.head = nn.Linear(adaptor.exemplar_dim, adaptor.num_classes)
        with torch.no_grad():
            self.convolution.weight.copy_(adaptor.exemplar.weight.unsqueeze(1))
            self.convolution.bias.copy_(adaptor.exemplar.bias)  # type: ignore[union-attr]
        self.head.load_state_dict(adaptor.head.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h_prime = self.convolution(x.unsqueeze(1)).squeeze(2)
        return h_prime, self.head(h_prime)


def public_epochs(
    layer: PublicLayer, train: Half, calibration: Half, orders: list[Tensor], settings: LayerSettings
) -> Iterator[float]:
    """Trains `layer`, yields every epoch's balanced calibration loss."""
    optimiser = torch.optim.Adam(layer.parameters(), lr=settings.learning_rate)
    q, d = torch.full((len(train.x),), SOFTMAX_Q), torch.ones(len(train.x))
    for order in orders:
        for batch in torch.split(order, settings.batch_size):
            optimiser.zero_grad()
            sdm_loss(layer(train.x[batch])[1], q[batch], d[batch], train.labels[batch]).mean().backward()
            optimiser.step()
        with torch.no_grad():
            (h_train, z_train), (h_cal, z_cal) = layer(train.x), layer(calibration.x)
        support = FlatSupport.build(h_train, train.labels, z_train.argmax(dim=1))
        own_q, own_nearest = support.compare(h_train, z_train.argmax(dim=1), own_rows=True)
        cal_q, cal_nearest = support.compare(h_cal, z_cal.argmax(dim=1))
        own = ClasswiseECDF.fit(own_nearest, own_q, train.labels, 2)
        q, d = own_q.float(), own.quantile(own_nearest)
        ecdf = ClasswiseECDF.fit(cal_nearest, cal_q, calibration.labels, 2)
        losses = sdm_loss(z_cal, cal_q.float(), ecdf.quantile(cal_nearest), calibration.labels)
        yield float(balanced_loss(losses, calibration.labels, 2).mean())


def draw_half(n: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 2, (n,), generator=generator)
    spread = torch.arange(1, width + 1) ** -0.4
    h = torch.randn(n, width, generator=generator) * spread
    h[:, 5:25] += 0.3 * (2 * labels - 1).unsqueeze(1)
    return h, labels


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, what `step` returned)"""
    start = time.process_time()
    value = step()
    return time.process_time() - start, value


def main(
    rows: Annotated[int, typer.Option(help="Rows of each half.")] = 2500,
    width: Annotated[int, typer.Option(help="D, width of h.")] = 1152,
    exemplar_dim: Annotated[int, typer.Option(help="M, width of h'.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Epochs timed of each way, after one that isn't.")] = RENEWED,
    seed: int = 0,
) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    (h_train, y_train), (h_cal, y_cal) = (draw_half(rows, width, generator) for _ in range(2))
    mean, scale = fit_standardisation(h_train)
    adaptor = ExemplarAdaptor(mean, scale, exemplar_dim, 2, generator)
    train = Half(adaptor.standardise(h_train), y_train)
    calibration = Half(adaptor.standardise(h_cal), y_cal)
    orders = [torch.randperm(rows, generator=generator) for _ in range(rounds + 1)]
    settings = LayerSettings(exemplar_dim=exemplar_dim)
    public = public_epochs(PublicLayer(adaptor), train, calibration, orders, settings)
    ours = run_epochs(adaptor, train, calibration, iter(orders), settings)

    times: list[tuple[float, float]] = []
    losses: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        ours_s, ours_loss = timed(lambda: next(ours).loss)
        public_s, public_loss = timed(lambda: next(public))
        times.append((public_s, ours_s))
        losses.append((public_loss, ours_loss))
    times = times[1:]
    ratios = sorted(theirs / own for theirs, own in times)
    result = {
        "rows": rows,
        "width": width,
        "exemplar_dim": exemplar_dim,
        "public_s": statistics.median(theirs for theirs, _ in times),
        "ours_s": statistics.median(own for _, own in times),
        "ratio": sum(theirs for theirs, _ in times) / sum(own for _, own in times),
        "ratio_median": statistics.median(ratios),
        "ratio_lowest": ratios[0],
        "ratio_highest": ratios[-1],
        "largest_loss_difference": max(abs(theirs - own) for theirs, own in losses),
        "losses": [own for _, own in losses],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
