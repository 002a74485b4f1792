"""The paper's dynamic balance strategy, with clients counted by their samples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pplr.federation.methods.base import RoundView, register
from pplr.federation.methods.pplr import PPLR

__all__ = ["WeightedPPLR"]


@register
class WeightedPPLR(PPLR):
    r"""PPLR in which an adapter counts by the samples that it was trained on. Not the paper's.

    θ_i' = (n_i S_ii θ_i + w_i Σ_{j≠i} n_j S_ij θ_j) / (n_i S_ii + w_i Σ_{j≠i} n_j S_ij)

    The paper's mixing gives every adapter of equal similarity an equal part, however little its client knows. With
    equal similarity and no heating this is FedAvg; with clients of one size it is PPLR.
    """

    name: ClassVar[str] = "pplr_weighted"

    def parts(self, alike: NDArray[np.float64], view: RoundView) -> NDArray[np.float64]:
        """Multiply the similarity with each client by that client's samples."""
        return alike * np.asarray(view.samples, dtype=np.float64)[None, :]
