"""An ensemble of J models: all must admit; the least certain voter gives the values (2509.12760, A.7).

    y_hat    = the class most models predict
    admitted = all models predict it and all admit;  the same for the lower estimator
    is_ood   = any model finds the point out of distribution
    SDM, q'  = those of the model that, among those predicting y_hat, has the smallest SDM_y_hat

Decided here: a tied vote goes to the lowest class (the public code draws at random; a tied point can't
be admitted anyway). Among models with equal SDM, the first gives the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from candor.sdm.outputs import Estimate


@dataclass(frozen=True, eq=False)
class EnsembleEstimate:
    """n rows: y_hat, speaker, speaker_lower (n,) int64 (the model whose values follow); sdm, sdm_lower (n, C);
    q_prime, q_prime_lower (n,) float32; is_ood, admitted, admitted_lower, tied (n,) bool."""

    y_hat: Tensor
    speaker: Tensor
    speaker_lower: Tensor
    sdm: Tensor
    sdm_lower: Tensor
    q_prime: Tensor
    q_prime_lower: Tensor
    is_ood: Tensor
    admitted: Tensor
    admitted_lower: Tensor
    tied: Tensor


def combine(estimates: Sequence[Estimate]) -> EnsembleEstimate:
    """The ensemble's verdict from each model's estimate of the same n rows at the same alpha."""
    if not estimates:
        raise ValueError("an ensemble needs at least one estimate")
    votes = torch.stack([e.y_hat for e in estimates])  # (J, n)
    counts = torch.nn.functional.one_hot(votes, estimates[0].sdm.shape[1]).sum(dim=0)  # (n, C)
    y_hat = counts.argmax(dim=1)
    tied = (counts == counts.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    agreed = (votes == y_hat).all(dim=0)

    def speak(sdm: Tensor, q_prime: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(J, n, C), (J, n) -> the least certain voter, its SDM and its q'."""
        top = sdm.gather(2, y_hat.expand(len(estimates), -1).unsqueeze(2)).squeeze(2)  # (J, n)
        speaker = top.masked_fill(votes != y_hat, torch.inf).argmin(dim=0)
        rows = torch.arange(len(y_hat))
        return speaker, sdm[speaker, rows], q_prime[speaker, rows]

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(e, name) for e in estimates])

    speaker, sdm, q_prime = speak(stacked("sdm"), stacked("q_prime"))
    speaker_lower, sdm_lower, q_prime_lower = speak(stacked("sdm_lower"), stacked("q_prime_lower"))
    return EnsembleEstimate(
        y_hat=y_hat,
        speaker=speaker,
        speaker_lower=speaker_lower,
        sdm=sdm,
        sdm_lower=sdm_lower,
        q_prime=q_prime,
        q_prime_lower=q_prime_lower,
        is_ood=stacked("is_ood").any(dim=0),
        admitted=agreed & stacked("admitted").all(dim=0),
        admitted_lower=agreed & stacked("admitted_lower").all(dim=0),
        tied=tied,
    )
