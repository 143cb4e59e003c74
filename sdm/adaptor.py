"""The exemplar adaptor maps frozen states h to exemplar vectors h' and logits z'.

    x  = (h - mean) / scale
    h' = W x + b        in R^M
    z' = V h' + c       in R^C,      y_hat = argmax z'

(arXiv 2509.12760, section 3: a 1-D convolution whose kernel is as wide as h, that is, a linear map;
no nonlinearity.) Distances are taken between h', decisions from z'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from candor.sdm.arithmetic import LARGEST, RoundedLinear

Block = tuple[int, Literal["scalar", "feature"]]


def fit_standardisation(h: Tensor, blocks: Sequence[Block] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and scale of the training states, one entry per dimension: (D,), (D,) float32.

    h: (n, D), n >= 2. blocks: widths that sum to D. A "scalar" block has one mean and one standard
    deviation over all its entries (the papers' standardisation, and the default over the whole of
    h). A "feature" block has them per dimension and is scaled until its total variance equals that of
    the widest block, so that six numbers beside a thousand still influence distances. Standard
    deviations divide by n - 1. A constant block keeps scale 1.
    """
    blocks = [(h.shape[1], "scalar")] if blocks is None else blocks
    widths = [width for width, _ in blocks]
    if sum(widths) != h.shape[1]:
        raise ValueError(f"blocks of widths {widths} cover {sum(widths)} of h's {h.shape[1]} dimensions")
    if len(h) < 2:
        raise ValueError(f"standardisation needs at least 2 rows, got {len(h)}")
    means, scales = [], []
    for part, (width, kind) in zip(torch.split(h.double(), widths, dim=1), blocks, strict=True):
        samples = part if kind == "feature" else part.reshape(-1, 1)
        mean, scale = samples.mean(0), samples.std(0)
        if kind == "feature":
            scale = scale * (width / max(widths)) ** 0.5
        means.append(mean.expand(width))
        scales.append(torch.where(scale > 0, scale, 1.0).expand(width))
    return torch.cat(means).float(), torch.cat(scales).float()


class ExemplarAdaptor(nn.Module):
    """The map above. `mean` and `scale` (D,) are buffers; the two linear maps are trained.

    PyTorch's default initialisation, drawn from `generator` where one is given.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        exemplar_dim: int,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())
        self.exemplar = nn.Linear(len(mean), exemplar_dim)
        self.head = nn.Linear(exemplar_dim, num_classes)
        if generator is not None:
            for layer in (self.exemplar, self.head):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    @property
    def input_dim(self) -> int:
        return self.exemplar.in_features

    @property
    def exemplar_dim(self) -> int:
        return self.exemplar.out_features

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def standardise(self, h: Tensor) -> Tensor:
        """x (n, D) from h (n, D)."""
        return (h.float() - self.mean) / self.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """h' (n, M) and z' (n, C) of standardised x (n, D): fast, differentiable, for training.

        Scores are taken with `FrozenAdaptor`, whose values don't depend on the batch.
        """
        h_prime = self.exemplar(x)
        return h_prime, self.head(h_prime)


class FrozenAdaptor:
    """An adaptor's map as of construction. Every row is correctly rounded, whatever its batch.

    Decided here: a row is finite iff h and z' are and no entry of h' exceeds `arithmetic.LARGEST`. A row that
    isn't finite has h' = z' = 0.
    """

    def __init__(self, adaptor: ExemplarAdaptor) -> None:
        self._adaptor = adaptor
        self._exemplar = RoundedLinear(adaptor.exemplar.weight, adaptor.exemplar.bias)
        self._head = RoundedLinear(adaptor.head.weight, adaptor.head.bias)

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h (n, D) -> h' (n, M), z' (n, C) float32, y_hat (n,) int64, finite (n,) bool."""
        x = self._adaptor.standardise(h)
        finite = torch.isfinite(x).all(dim=1)
        h_prime = self._exemplar(x.where(finite.unsqueeze(1), 0.0))
        finite &= h_prime.abs().amax(dim=1) <= LARGEST
        h_prime = h_prime.where(finite.unsqueeze(1), 0.0)
        z_prime = self._head(h_prime)
        finite &= torch.isfinite(z_prime).all(dim=1)
        known = finite.unsqueeze(1)
        z_prime = z_prime.where(known, 0.0)
        return h_prime.where(known, 0.0), z_prime, z_prime.argmax(dim=1), finite
