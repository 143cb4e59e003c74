"""Checks a training trace: by a new run from the recorded initial weights and orders, and each epoch by itself.

The run checks the weights. Scoring both halves with each epoch's recorded weights checks q, d and losses,
without rounding errors of earlier epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.conformance.doubt import d_in_doubt, q_range, y_in_doubt
from benchmarks.conformance.fixture import Fixture, Tally
from candor.calibration.epochs import Half, LayerSettings, run_epochs, score_halves
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.conventions import RECORDED
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.estimator import SDMEstimator
from candor.sdm.similarity import neighbourhood
from candor.sdm.support import Support

RECORDED_CAP = 2048
PARAMETERS = {
    "conv_weight": "exemplar.weight",
    "conv_bias": "exemplar.bias",
    "fc_weight": "head.weight",
    "fc_bias": "head.bias",
}


def check_training(f: Fixture, t: Tally) -> None:
    settings = LayerSettings(
        exemplar_dim=f["init_conv_weight"].shape[0],
        epochs=len(f["perm"]),
        batch_size=int(f.settings["batch_size"]),
        learning_rate=float(f.settings["learning_rate"]),
    )
    adaptor = _adaptor(f, [f[f"init_{name}"] for name in PARAMETERS])
    train = Half(adaptor.standardise(f["x_train"]), f["y_train"])
    calibration = Half(adaptor.standardise(f["x_cal"]), f["y_cal"])
    orders = (order.clone() for order in f["perm"])
    losses = []
    for i, epoch in enumerate(
        run_epochs(adaptor, train, calibration, orders, settings, RECORDED, exact=True)
    ):
        for name, parameter in PARAMETERS.items():
            got = adaptor.state_dict()[parameter]
            t.close(f"epoch {i + 1}: {name}", got, f[f"epoch_{name}"][i], 1e-5)
        losses.append(epoch.loss)
        _epoch(f, t, i, train, calibration)
    t.close("cal_balanced_loss along the run", torch.tensor(losses), f["cal_balanced_loss"])
    best = max(i for i, loss in enumerate(losses) if loss == min(losses))
    t.equal("best_epoch", torch.tensor([best + 1]), f["best_epoch"])
    fitted = SDMEstimator.fit(
        _epoch_adaptor(f, best),
        (f["x_train"], f["y_train"]),
        (f["x_cal"], f["y_cal"]),
        [float(f.settings["alpha"])],
        RECORDED,
    )
    (region,) = fitted.regions.values()
    t.close("final_q_prime_min", torch.tensor([region.q_prime_min]), f["final_q_prime_min"], 1e-4)
    t.close("final_psi", region.psi, f["final_psi"])


def _adaptor(f: Fixture, weights: list[Tensor]) -> ExemplarAdaptor:
    mean, scale = (value.expand(f["x_train"].shape[1]) for value in f["mean_std"])
    adaptor = ExemplarAdaptor(mean, scale, weights[0].shape[0], weights[2].shape[0])
    adaptor.load_state_dict(dict(zip(PARAMETERS.values(), weights, strict=True)), strict=False)
    return adaptor


def _epoch_adaptor(f: Fixture, i: int) -> ExemplarAdaptor:
    return _adaptor(f, [f[f"epoch_{name}"][i] for name in PARAMETERS])


def _epoch(f: Fixture, t: Tally, i: int, train: Half, calibration: Half) -> None:
    """Checks epoch i (from 0): both halves are scored with its recorded weights."""
    adaptor = _epoch_adaptor(f, i)
    with torch.no_grad():
        h_train, z_train = adaptor(train.x)
        h_cal, z_cal = adaptor(calibration.x)
    support = Support(h_train, train.labels, z_train.argmax(dim=1))
    first = neighbourhood(h_train, support.predictions, support).nearest
    scores = score_halves(adaptor, train, calibration, RECORDED)
    for p, got, half, h, z, left_out in (
        ("train", scores[0], train, h_train, z_train, first),
        ("cal", scores[1], calibration, h_cal, z_cal, None),
    ):
        max_q = RECORDED_CAP if left_out is None else RECORDED_CAP - 1
        low, high = q_range(h, z.argmax(dim=1), support, max_q, left_out)
        doubt = (low != high) | y_in_doubt(z)
        t.equal(f"epoch {i + 1}: {p}_q", got.q, f[f"{p}_q"][i], ~doubt)
        t.true(
            f"epoch {i + 1}: {p}_q in doubt", (low <= f[f"{p}_q"][i]) & (f[f"{p}_q"][i] <= high), low != high
        )
        # A row in doubt may be in one eCDF and not in the other, or next to another row's entry.
        ecdf = ClasswiseECDF.fit(got.d_nearest, got.q, half.labels, adaptor.num_classes)
        own = one_hot(half.labels, adaptor.num_classes) * (got.q > 0).unsqueeze(1)
        moved = ((got.q > 0) != (f[f"{p}_q"][i] > 0)).sum() + d_in_doubt(got.d_nearest, ecdf, h, own)
        step = 1 / ecdf.sizes().clamp(min=1).min()
        t.close(f"epoch {i + 1}: {p}_d", got.d, f[f"{p}_d"][i], 1e-6 + moved * step)
        accuracy = f[f"{p}_accuracy"][i : i + 1]
        allowed = (1e-6 + y_in_doubt(z).double().mean()).expand(1)
        t.close(f"epoch {i + 1}: {p}_accuracy", got.correct.double().mean().reshape(1), accuracy, allowed)
        t.close(f"epoch {i + 1}: {p}_class_loss", got.class_loss, f[f"{p}_class_loss"][i])
    t.close(
        f"epoch {i + 1}: cal_balanced_loss",
        scores[1].class_loss.mean().reshape(1),
        f["cal_balanced_loss"][i : i + 1],
    )
    marginal = f["train_marginal_loss"][i : i + 1]
    t.close(f"epoch {i + 1}: train_marginal_loss", scores[0].losses.double().mean().reshape(1), marginal)
