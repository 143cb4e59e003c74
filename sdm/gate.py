"""The first gate: is a prompt of the kind that was calibrated on? The end of prefill decides it, before decoding.

    s     = [ mean state over the prompt's positions ; state at its last position ]                  in R^P
    x     = (s - mean) / scale          mean per dimension, scale per block (its overall standard deviation)
    w     = whitened principal components of x                                                       in R^k
    D     = |w|^2 + (|x|^2 - |x's part within the components|^2) / residual variance per dimension
    p     = (1 + #{reference D >= D}) / (m + 1)
    known iff  p > l / (m + 1)

D is, up to constants, minus twice the log-likelihood of a Gaussian whose k largest axes are its own and whose others
share one variance (probabilistic PCA, Tipping and Bishop 1999). The reference holds D of m records that fitted
nothing, so p is uniform over its steps for a record that is drawn as they were, and the rate at which such records
are refused is, over draws of the reference, Beta(l, m + 1 - l) at most (Bates et al. 2023, 2104.08279):
`calibration.gates.rank_cut` picks l by it. The gate is unsupervised, because training for the verdict makes states
lose what tells unfamiliar prompts apart.

Every value of a row is a function of that row alone (sdm/arithmetic.py). A row that isn't finite is at D = inf and
never known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from candor.sdm.adaptor import fit_standardisation
from candor.sdm.arithmetic import LARGEST, RoundedLinear, squared_lengths

ROWS_PER_COMPONENT = 4
"""Minimum rows for each component; fewer rows give fewer components."""


class RankTest:
    """A prompt's rank among m records of the calibrated kind that fitted nothing: the farther out, the stranger.

    reference (m,) float64, ascending; rank_cut () int64, l in 0..m (0: every finite prompt is known).
    """

    reference: Tensor
    rank_cut: Tensor

    def at_least(self, distance: Tensor) -> Tensor:
        """#{reference D >= D}: (n,) -> (n,) int64."""
        return len(self.reference) - torch.searchsorted(self.reference, distance, right=False)

    def p_value(self, distance: Tensor) -> Tensor:
        """p of distances (n,): (n,) float64 in [1 / (m + 1), 1]."""
        return (1 + self.at_least(distance)).double() / (len(self.reference) + 1)

    def known(self, distance: Tensor) -> Tensor:
        """(n,) bool, of distances (n,)."""
        return (self.at_least(distance) >= self.rank_cut) & distance.isfinite()


@dataclass(frozen=True, eq=False)
class PromptGate(RankTest):
    """mean, scale (P,) float32; whitening (k, P) float32: components over their standard deviations;
    deviations (k,) float64: those; residual_variance () float64, per dimension outside the components;
    reference (m,) float64, ascending; rank_cut () int64, l in 0..m (0: every finite prompt is known)."""

    mean: Tensor
    scale: Tensor
    whitening: Tensor
    deviations: Tensor
    residual_variance: Tensor
    reference: Tensor
    rank_cut: Tensor

    @classmethod
    def fit(
        cls, states: Tensor, reference: Tensor, widths: Sequence[int], components: int, rank_cut: int
    ) -> PromptGate:
        """states (n, P): what distances are fitted on. reference (m, P): of records that fit nothing. Both finite.

        widths: of the blocks of P, each scaled by itself. components: k, at most n / ROWS_PER_COMPONENT.
        Raises ValueError where states are too few or all alike, or rank_cut exceeds m.
        """
        k = min(components, len(states) // ROWS_PER_COMPONENT, states.shape[1] - 1)
        if k < 1:
            raise ValueError(
                f"a gate needs at least {ROWS_PER_COMPONENT} prompts to fit on, got {len(states)}"
            )
        if not 0 <= rank_cut <= len(reference):
            raise ValueError(
                f"rank_cut must be in 0..{len(reference)} (the reference's size), got {rank_cut}"
            )
        _, scale = fit_standardisation(states, [(width, "scalar") for width in widths])
        mean = states.double().mean(0).float()
        x = ((states.float() - mean) / scale).double()
        _, lengths, axes = torch.linalg.svd(x, full_matrices=False)
        variances = lengths.square() / (len(x) - 1)
        rest = variances[k:].sum() / (x.shape[1] - k)
        if not rest > 0:
            raise ValueError(
                "the prompts' states are all alike, or not finite: nothing tells a stranger from them"
            )
        deviations = variances[:k].sqrt()
        whitening = (axes[:k] / deviations.unsqueeze(1)).float()
        empty = torch.empty(0, dtype=torch.float64)
        bare = cls(mean, scale, whitening, deviations, rest, empty, torch.tensor(rank_cut))
        return bare.with_reference(reference, rank_cut)

    def with_reference(self, reference: Tensor, rank_cut: int) -> PromptGate:
        """The same distances, measured against the states (m, P) of other records."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        distances = self.distance(reference).sort().values
        return PromptGate(**(kept | {"reference": distances, "rank_cut": torch.tensor(rank_cut)}))

    @cached_property
    def _whiten(self) -> RoundedLinear:
        return RoundedLinear(self.whitening, torch.zeros(len(self.whitening)))

    def distance(self, states: Tensor) -> Tensor:
        """D of states (n, P), any float dtype: (n,) float64 in [0, inf]."""
        if states.dim() != 2 or states.shape[1] != len(self.mean):
            raise ValueError(f"prompt states must be (n, {len(self.mean)}), got {tuple(states.shape)}")
        x = (states.float() - self.mean) / self.scale
        finite = (x.abs() <= LARGEST).all(dim=1)  # also false for NaN
        x = x.where(finite.unsqueeze(1), 0.0)
        whitened = self._whiten(x)
        within = squared_lengths(whitened.double() * self.deviations)
        outside = (squared_lengths(x) - within).clamp(min=0)
        distance = squared_lengths(whitened) + outside / self.residual_variance
        return distance.where(finite, torch.inf)

    def state(self) -> dict[str, Tensor]:
        """Its fields; `from_state` restores it to the bit."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PromptGate:
        """The inverse of `state`. Raises ValueError naming missing or unexpected tensors, or wrong shapes."""
        require_names("gate", state, {field.name for field in fields(cls)})
        gate = cls(**state)
        k, width = gate.whitening.shape
        shapes = {
            "mean": (width,),
            "scale": (width,),
            "deviations": (k,),
            "residual_variance": (),
            "rank_cut": (),
        }
        require_shapes("gate", state, shapes)
        return gate


def require_names(what: str, state: Mapping[str, Tensor], names: set[str]) -> None:
    """Raises ValueError unless `state` has exactly these names."""
    if set(state) != names:
        missing, unexpected = sorted(names - set(state)), sorted(set(state) - names)
        raise ValueError(f"{what} tensors: missing {missing}, unexpected {unexpected}")


def require_shapes(what: str, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless tensors have these shapes."""
    wrong = {name: tuple(state[name].shape) for name, shape in shapes.items() if state[name].shape != shape}
    if wrong:
        raise ValueError(f"{what} tensors have shapes {wrong}; expected {dict(shapes)}")
